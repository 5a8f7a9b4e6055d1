"""Codecs by their bits, of the kind that is asked for."""

import pytest

from moekit.core.codec_choice import codec_at, nominal_bits
from moekit.core.errors import UserError
from moekit.core.packed import CodecChoice
from moekit.core.registry import registry


@pytest.mark.parametrize(
    ("default", "bits", "name"),
    [
        ("int4", 3, "int3"), ("int4-zp", 2, "int2-zp"), ("nested4", 3, "nested3"),
        ("nested4", 2, "int2-zp"), ("int4-zp", 16, "bf16"), ("int4", 1, "binary"),
        ("int3-zp", 1.58, "ternary"), ("ternary-rows", 1.58, "ternary-rows"), ("fp16", 16, "fp16"),
    ],
)  # fmt: skip
def test_kind_and_group_size_stay(default, bits, name):
    assert codec_at(bits, CodecChoice(default, 64)) == CodecChoice(name, 64)


def test_every_codec_is_found_by_its_own_bits():
    for method in registry.methods(kind="codec"):
        choice = CodecChoice(method.name, 32)
        assert codec_at(nominal_bits(method.name), choice) == choice


def test_bits_without_a_codec_are_refused():
    with pytest.raises(UserError, match=r"5 bits, and there is no codec 'int5'"):
        codec_at(5, CodecChoice("int4", 32))
