"""The compiled kernels beside the double loop on decoded weights, in float64."""

import pytest
import torch

pytest.importorskip("triton")

from moekit.ops.codecs import make_codec
from moekit.ops.triton.experts import GroupedExperts, matmul
from moekit.ops.triton.launch import FEW_TOKENS
from tests.ops.triton.records import FUNCTIONS, Writer, bank

CODECS = ["int8", "int8-zp", "int4", "int4-zp", "int3", "int3-zp", "int2", "int2-zp"]
CODECS += ["nested3", "nested4", "nested6", "bf16", "fp16", "fp32"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTH, INNER, EXPERTS, TOP_K = 512, 256, 8, 3


def drawn(tokens, width=WIDTH, seed=0):
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=draw)
    weights, ids = torch.rand(tokens, EXPERTS, generator=draw).topk(TOP_K)
    return hidden, ids, weights


def run(made, hidden, ids, weights, parts=None):
    grouped = GroupedExperts(made.formats, made.memory.cuda())
    call = grouped.start(hidden.cuda(), ids.cuda(), weights.cuda())
    call._out.fill_(float("nan"))
    for part in [list(made.offsets)] if parts is None else parts:
        call.run({e: made.offsets[e] for e in part})
    return call.result().cpu()


def tolerance(dtype):
    """The middle and the result are rounded once each; float32 sums come in another order."""
    step = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    return {"rtol": step, "atol": step}


@pytest.mark.parametrize("tokens", [1, FEW_TOKENS, FEW_TOKENS + 1, 40, 300])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("codec", CODECS)
def test_experts(codec, dtype, tokens):
    made = bank([codec] * EXPERTS, WIDTH, INNER)
    hidden, ids, weights = drawn(tokens)
    out = run(made, hidden.to(dtype), ids, weights)
    expected = made.naive(hidden.to(dtype), ids, weights)
    torch.testing.assert_close(out.float(), expected, **tolerance(dtype))


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("activation", [*FUNCTIONS, "clamped_swiglu"])
@pytest.mark.parametrize("group", [32, 128])
def test_activations_biases_and_groups(activation, group, tokens):
    made = bank(["int4"] * EXPERTS, WIDTH, INNER, activation=activation, biases=True, group=group)
    hidden, ids, weights = drawn(tokens)
    out = run(made, hidden, ids, weights)
    expected = made.naive(hidden, ids, weights)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [2, 70])
@pytest.mark.parametrize(("width", "inner"), [(50, 24), (333, 170)])
def test_odd_sizes(width, inner, tokens):
    made = bank(["fp32"] * EXPERTS, width, inner, gated=False, activation="relu2")
    hidden, ids, weights = drawn(tokens, width)
    ids[0, 0], ids[1, 1] = -1, EXPERTS
    out = run(made, hidden, ids, weights)
    torch.testing.assert_close(out, made.naive(hidden, ids, weights), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 200])
def test_all_tokens_on_one_expert(tokens):
    made = bank(["int4"] * EXPERTS, WIDTH, INNER)
    hidden, ids, weights = drawn(tokens)
    ids[:] = 5
    out = run(made, hidden, ids, weights, [[5]])
    torch.testing.assert_close(out, made.naive(hidden, ids, weights), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [FEW_TOKENS, 40, 300])
def test_same_bits_whatever_the_grouping_and_the_company(dtype, tokens):
    made = bank(["int4", "int8", "nested4", "bf16", "int3", "int4", "int8", "fp32"], WIDTH, INNER)
    hidden, ids, weights = drawn(tokens)
    hidden = hidden.to(dtype)
    whole = run(made, hidden, ids, weights)
    assert torch.equal(run(made, hidden, ids, weights), whole)
    one_by_one = [[e] for e in reversed(range(EXPERTS))]
    assert torch.equal(run(made, hidden, ids, weights, one_by_one), whole)
    turned = run(made, hidden.flip(0), ids.flip(0), weights.flip(0))
    assert torch.equal(turned.flip(0), whole)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 130])
@pytest.mark.parametrize("codec", ["int8", "int4", "int4-zp"])
def test_matmul(codec, tokens, dtype):
    record = Writer()
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(333, WIDTH, generator=draw) / WIDTH**0.5
    made, dense = record.matrix(make_codec(codec), weight)
    x = torch.randn(tokens, WIDTH, generator=draw).to(dtype)
    out = matmul(x.cuda(), made, record.memory().cuda()).cpu()
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), x.float() @ dense.T, **tolerance(dtype))
