"""The kernels beside the double loop on decoded weights; without a GPU in Triton's interpreter."""

import pytest
import torch

pytest.importorskip("triton")

from moekit.ops.codecs import make_codec
from moekit.ops.triton.experts import GroupedExperts, matmul
from moekit.ops.triton.launch import FEW_TOKENS, Blocks, blocks_for
from tests.ops.triton.records import FUNCTIONS, Bank, Writer, bank

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CODECS = [
    "int8",
    "int4",
    "int3",
    "int2",
    "int4-zp",
    "int3-zp",
    "nested3",
    "nested5",
    "bf16",
    "fp32",
]
# Sums of a few hundred float32 products in another order.
EXACT = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that was not written to holds NaN."""
    new_empty = torch.Tensor.new_empty

    def poison(tensor, *shape, **options):
        made = new_empty(tensor, *shape, **options)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", poison)


def routing(tokens, experts, top_k, seed=0):
    draw = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, experts, generator=draw)
    weights, ids = scores.topk(top_k)
    return ids, weights


def run(made: Bank, hidden, ids, weights, parts=None):
    """The kernels' result, the experts launched in `parts`."""
    grouped = GroupedExperts(made.formats, made.memory.to(DEVICE))
    call = grouped.start(hidden.to(DEVICE), ids.to(DEVICE), weights.to(DEVICE))
    for part in [list(made.offsets)] if parts is None else parts:
        call.run({e: made.offsets[e] for e in part})
    return call.result().cpu()


@pytest.mark.parametrize("tokens", [1, FEW_TOKENS + 3])
@pytest.mark.parametrize("codec", CODECS)
def test_experts_of_a_codec(codec, tokens):
    made = bank([codec] * 4, width=96, inner=32)
    hidden = torch.randn(tokens, 96, generator=torch.Generator().manual_seed(1))
    ids, weights = routing(tokens, 4, 2)
    out = run(made, hidden, ids, weights)
    torch.testing.assert_close(out, made.naive(hidden, ids, weights), **EXACT)


@pytest.mark.parametrize("tokens", [1, FEW_TOKENS + 1])
@pytest.mark.parametrize("activation", [*FUNCTIONS, "clamped_swiglu"])
def test_activations_and_biases(activation, tokens):
    made = bank(["int8"] * 3, 64, 32, activation=activation, biases=True)
    hidden = 3 * torch.randn(tokens, 64, generator=torch.Generator().manual_seed(1))
    ids, weights = routing(tokens, 3, 2)
    out = run(made, hidden, ids, weights)
    torch.testing.assert_close(out, made.naive(hidden, ids, weights), **EXACT)


@pytest.mark.parametrize("tokens", [1, FEW_TOKENS + 1])
def test_without_a_gate(tokens):
    made = bank(["int4"] * 3, 64, 32, activation="relu2", gated=False)
    hidden = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(1))
    ids, weights = routing(tokens, 3, 2)
    out = run(made, hidden, ids, weights)
    torch.testing.assert_close(out, made.naive(hidden, ids, weights), **EXACT)


@pytest.mark.parametrize("tokens", [1, FEW_TOKENS + 1])
@pytest.mark.parametrize(("width", "inner"), [(50, 24), (33, 70)])
def test_odd_sizes(width, inner, tokens):
    made = bank(["fp32"] * 3, width, inner)
    hidden = torch.randn(tokens, width, generator=torch.Generator().manual_seed(1))
    ids, weights = routing(tokens, 3, 2)
    out = run(made, hidden, ids, weights)
    torch.testing.assert_close(out, made.naive(hidden, ids, weights), **EXACT)


@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.parametrize("tokens", [1, FEW_TOKENS + 1])
def test_group_sizes(group, tokens):
    # The last step of the loop over groups is not full.
    width = {64: 192, 128: 128}[group]
    made = bank(["int4", "nested4"], width, group, group=group)
    hidden = torch.randn(tokens, width, generator=torch.Generator().manual_seed(1))
    ids, weights = routing(tokens, 2, 2)
    out = run(made, hidden, ids, weights)
    torch.testing.assert_close(out, made.naive(hidden, ids, weights), **EXACT)


@pytest.mark.parametrize("tokens", [2, FEW_TOKENS + 30])
def test_all_tokens_on_one_expert(tokens):
    made = bank(["int4"] * 6, 64, 32)
    hidden = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(1))
    ids = torch.full((tokens, 1), 4)
    weights = torch.rand(tokens, 1, generator=torch.Generator().manual_seed(2))
    out = run(made, hidden, ids, weights, parts=[[4]])
    torch.testing.assert_close(out, made.naive(hidden, ids, weights), **EXACT)


@pytest.mark.parametrize("tokens", [2, FEW_TOKENS + 2])
def test_choices_that_run_nothing(tokens):
    made = bank(["int4"] * 3, 64, 32)
    hidden = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(1))
    ids, weights = routing(tokens, 3, 2)
    ids[0, 0], ids[1, 1] = -1, 3
    # What a choice of nothing weighs counts for nothing.
    weights[0, 0] = float("nan")
    out = run(made, hidden, ids, weights)
    expected = made.naive(hidden, ids, weights.nan_to_num())
    torch.testing.assert_close(out, expected, **EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, FEW_TOKENS + 3])
def test_half_precision(dtype, tokens):
    made = bank(["int4", "bf16", "nested4"], 64, 64)
    hidden = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    ids, weights = routing(tokens, 3, 2)
    out = run(made, hidden, ids, weights)
    assert out.dtype == dtype
    # The middle and the result are rounded once each, to 8 or 11 bits.
    step = torch.finfo(dtype).eps
    expected = made.naive(hidden, ids, weights)
    torch.testing.assert_close(out.float(), expected, rtol=2 * step, atol=2 * step)


@pytest.mark.parametrize("tokens", [FEW_TOKENS, FEW_TOKENS + 9])
def test_same_bits_however_the_experts_are_grouped(tokens):
    codecs = ["int4", "int8", "nested4", "bf16", "int3"]
    made = bank(codecs, 64, 32)
    hidden = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(1))
    ids, weights = routing(tokens, 5, 3)
    whole = run(made, hidden, ids, weights)
    for parts in ([[4], [3], [2], [1], [0]], [[1, 3], [0, 2, 4]]):
        assert torch.equal(run(made, hidden, ids, weights, parts), whole)


def test_an_expert_not_launched_is_noticed():
    made = bank(["int4"] * 2, 64, 32)
    ids, weights = routing(1, 2, 2)
    assert run(made, torch.ones(1, 64), ids, weights, parts=[[0]]).isnan().any()


@pytest.mark.parametrize("tokens", [1, FEW_TOKENS + 5])
@pytest.mark.parametrize("codec", ["int8", "int4-zp", "bf16"])
def test_matmul(codec, tokens):
    record = Writer()
    weight = torch.randn(70, 96, generator=torch.Generator().manual_seed(0))
    made, dense = record.matrix(make_codec(codec), weight)
    x = torch.randn(tokens, 96, generator=torch.Generator().manual_seed(1))
    out = matmul(x.to(DEVICE), made, record.memory().to(DEVICE)).cpu()
    torch.testing.assert_close(out, x @ dense.T, rtol=1e-4, atol=1e-4)


def test_blocks_are_those_of_the_call():
    assert blocks_for(64, 64) == Blocks(rows=64, warps=4, stages=3, pairs=16)
    assert [blocks_for(n, 8).pairs for n in (8, 128, 129, 256, 257, 10**6)] == [
        16, 16, 32, 32, 64, 64,
    ]  # fmt: skip
