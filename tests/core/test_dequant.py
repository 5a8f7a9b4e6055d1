"""Block FP8 and MXFP4: against double loops and against transformers' own decoders."""

import itertools

import pytest
import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from moekit.core.dequant import E2M1, dequantize, quantization_of
from moekit.core.errors import UserError
from tests.core.test_deferred import defer

BLOCK = {"quant_method": "fp8", "weight_block_size": [4, 8]}
MX = {"quant_method": "mxfp4"}


def generator():
    return torch.Generator().manual_seed(0)


def fp8_pair(shape, block=(4, 8)):
    weight = torch.randn(shape, generator=generator()).to(torch.float8_e4m3fn)
    grid = [-(-size // step) for size, step in zip(shape[-2:], block, strict=True)]
    scale = torch.rand(*shape[:-2], *grid, generator=generator()) + 0.5
    return weight, scale


def every_block(deferred, expected):
    assert deferred.dtype == expected.dtype == torch.float32
    assert torch.equal(deferred.read(), expected)
    for region in itertools.product(*([(0, s), (s // 2, s), (1, s - 1)] for s in expected.shape)):
        wanted = expected[tuple(slice(start, stop) for start, stop in region)]
        assert torch.equal(deferred.read(region), wanted), region


@pytest.mark.parametrize("shape", [(8, 16), (10, 21), (3, 9, 16), (3, 5)])
def test_fp8_equals_a_double_loop(shape):
    weight, scale = fp8_pair(shape)
    made = dequantize({"w": defer(weight), "w_scale_inv": defer(scale)}, BLOCK)
    assert list(made) == ["w"]
    expected = weight.float()
    for index in itertools.product(*(range(size) for size in shape)):
        expected[index] *= scale[(*index[:-2], index[-2] // 4, index[-1] // 8)]
    every_block(made["w"], expected)


def test_fp8_equals_transformers():
    weight, scale = fp8_pair((256, 384), (128, 128))
    made = dequantize({"w": defer(weight), "w_scale_inv": defer(scale)}, {"quant_method": "fp8"})
    theirs = Fp8Dequantize(None)._dequantize_one(weight, scale, torch.bfloat16)
    assert torch.equal(made["w"].read().bfloat16(), theirs)


def test_fp8_with_one_scale_and_with_none():
    weight, _ = fp8_pair((6, 5))
    made = dequantize(
        {
            "a": defer(weight),
            "a_scale_inv": defer(torch.tensor(0.25)),
            "a.activation_scale": defer(torch.tensor(1.0)),
            "plain": defer(torch.ones(3)),
        },
        BLOCK,
    )
    assert sorted(made) == ["a", "plain"]
    every_block(made["a"], weight.float() * 0.25)


def packed(experts=3, rows=6, groups=2, size=16):
    blocks = torch.randint(0, 256, (experts, rows, groups, size), generator=generator()).byte()
    scales = torch.randint(120, 134, (experts, rows, groups), generator=generator()).byte()
    return blocks, scales


def test_mxfp4_equals_a_loop_and_transformers():
    blocks, scales = packed()
    made = dequantize({"w_blocks": defer(blocks), "w_scales": defer(scales)}, MX)
    assert list(made) == ["w"]
    expected = torch.empty(3, 2 * 16 * 2, 6)
    for e, o, g, b in itertools.product(range(3), range(6), range(2), range(16)):
        byte = int(blocks[e, o, g, b])
        for half, number in enumerate((byte & 15, byte >> 4)):
            value = E2M1[number] * 2.0 ** (int(scales[e, o, g]) - 127)
            expected[e, g * 32 + b * 2 + half, o] = value
    every_block(made["w"], expected)
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    assert torch.equal(expected.bfloat16(), theirs)


def test_mxfp4_reads_one_expert_at_a_time():
    blocks, scales = packed()
    log = []
    made = dequantize({"w_blocks": defer(blocks, log), "w_scales": defer(scales)}, MX)
    made["w"].rows(2, 3)
    assert log == [((2, 3), (0, 6), (0, 2), (0, 16))]


def test_other_tensors_pass():
    bias, (blocks, scales) = torch.ones(4), packed()
    tensors = {"w_blocks": blocks, "w_scales": scales, "w_bias": bias, "logit_scales": bias}
    made = dequantize({name: defer(tensor) for name, tensor in tensors.items()}, MX)
    assert sorted(made) == ["logit_scales", "w", "w_bias"]


def test_refusals():
    weight, scale = fp8_pair((8, 16))
    with pytest.raises(UserError, match="quantised with 'awq'; only fp8, mxfp4"):
        dequantize({}, {"quant_method": "awq"})
    with pytest.raises(UserError, match=r"should be \[2, 2\]; they are \[1, 2\]"):
        dequantize({"w": defer(weight), "w_scale_inv": defer(scale[:1])}, BLOCK)
    with pytest.raises(UserError, match="only float8 is supported"):
        dequantize({"w": defer(weight.float()), "w_scale_inv": defer(scale)}, BLOCK)
    blocks, scales = packed()
    with pytest.raises(UserError, match="do not fit"):
        dequantize({"w_blocks": defer(blocks), "w_scales": defer(scales[:, 1:])}, MX)


def test_quantization_of_a_config():
    assert quantization_of({"quantization_config": BLOCK}) == BLOCK
    assert quantization_of({"text_config": {"quantization_config": MX}}) == MX
    assert quantization_of({"text_config": None, "quantization_config": None}) is None
