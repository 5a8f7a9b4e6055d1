"""The C++ encoder gives the bytes of the codec."""

import pytest
import torch

from moekit.core.errors import UserError
from moekit.ops.codecs import make_codec
from moekit.ops.native import Pool, library
from moekit.ops.native.encode import encode_in_memory, nbytes_in_memory
from moekit.ops.native.formats import in_memory

pytestmark = pytest.mark.skipif(library() is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def pool():
    return Pool(library(), 2)


def weights(rows, dtype):
    made = torch.randn(rows, 256, generator=torch.Generator().manual_seed(rows))
    made[1] = 0
    made[2] *= 1e-6  # scales below the smallest normal float16
    made[3] *= 5e4
    made[4, :32] = torch.arange(32) - 7.5  # levels that lie half way
    return made.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["int8", "int4", "int3", "int4-zp"])
@pytest.mark.parametrize("group_size", [32, 128])
def test_bytes_are_those_of_the_codec(pool, name, group_size, dtype):
    codec = make_codec(name, group_size)
    for rows in (32, 21):
        weight = weights(rows, dtype)
        weight[~weight.isfinite()] = 0
        memory = torch.full((nbytes_in_memory(codec, (rows, 256)),), 7, dtype=torch.uint8)
        format = encode_in_memory(pool, codec, weight, memory)
        expected_format, expected = in_memory(codec, codec.encode(weight))
        assert torch.equal(memory, expected)
        assert bytes(format) == bytes(expected_format)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_what_the_codec_refuses_is_refused(pool, bad):
    weight = torch.ones(32, 64)
    weight[17, 40] = bad
    codec = make_codec("int8")
    size = nbytes_in_memory(codec, (32, 64))
    with pytest.raises(UserError, match=r"1 of the weights|beyond float16"):
        encode_in_memory(pool, codec, weight, torch.empty(size, dtype=torch.uint8))
