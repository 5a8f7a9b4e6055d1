"""Which codec holds an expert at the bits that a plan gives it."""

from __future__ import annotations

import dataclasses
import re

from moekit.core.errors import UserError
from moekit.core.packed import CodecChoice
from moekit.ops.codecs import make_codec

DEFAULT_CODEC = CodecChoice("int4", 32)
# log2 of three levels, to two digits.
TERNARY_BITS = 1.58
_PLAIN_BITS = {"fp32": 32, "bf16": 16, "fp16": 16}


def nominal_bits(name: str) -> float:
    """The bits of a codec's codes, without its scales: what a plan calls it by."""
    if name in _PLAIN_BITS:
        return _PLAIN_BITS[name]
    if name.startswith("ternary"):
        return TERNARY_BITS
    digits = re.search(r"\d+", name)
    return int(digits[0]) if digits else 1


def codec_at(bits: float, default: CodecChoice) -> CodecChoice:
    """The codec of `bits` bits of the same kind as `default`: int4-zp at 3 is int3-zp.

    1 is binary and 1.58 ternary in every kind. Raises `UserError` for bits that the kind does not
    have.
    """
    if bits == nominal_bits(default.name):
        return default
    whole = {16: "bf16", 1: "binary", TERNARY_BITS: "ternary"}
    if bits in whole:
        return dataclasses.replace(default, name=whole[bits])
    kind = re.fullmatch(r"(int|nested)\d(-zp)?", default.name)
    prefix, suffix = (kind[1], kind[2] or "") if kind else ("int", "")
    if prefix == "nested" and bits == 2:
        prefix, suffix = "int", "-zp"
    name = f"{prefix}{bits:g}{suffix}"
    try:
        make_codec(name, default.group_size)
    except UserError:
        raise UserError(
            f"The plan asks for {bits:g} bits, and there is no codec {name!r}; with --codec "
            f"{default.name} a plan may use the bits of its kind, and 16."
        ) from None
    return dataclasses.replace(default, name=name)
