"""The lean experts against a loop over pairs: outputs, gradients, and what they keep in memory."""

import pytest
import torch
from torch import Tensor

from moekit.ops.activations import ACTIVATIONS
from moekit.ops.grouped import grouped_experts, has_plain_banks, ragged_experts
from moekit.ops.pairs import PAD, dispatch_plan
from tests.families.tiny import build_tiny

T, D, F, E, K = 37, 16, 24, 8, 3
ROUTINGS = ["top-k", "ragged", "one expert", "one token", "empty experts", "no pairs"]


def naive(hidden, token, expert, weight, up, down, *, activation="silu", gated=True) -> Tensor:
    """Pair by pair, one expert on one token."""
    act = ACTIVATIONS[activation].forward
    rows = [torch.zeros(hidden.shape[1], dtype=hidden.dtype) for _ in hidden]
    for t, e, w in zip(token.tolist(), expert.tolist(), weight, strict=True):
        wide = up[e] @ hidden[t]
        gate, rest = wide[: down.shape[2]], wide[down.shape[2] :]
        rows[t] = rows[t] + w * (down[e] @ (act(gate) * rest if gated else act(gate)))
    return torch.stack(rows)


def case(routing: str, dtype: torch.dtype, gated: bool = True) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(3)
    tokens = 1 if routing == "one token" else T
    token = torch.arange(tokens).repeat_interleave(K)
    expert = torch.rand(tokens, E, generator=draw).argsort(-1)[:, :K].reshape(-1)
    if routing == "ragged":
        # Not sorted by token, some tokens without a pair, some pairs twice.
        chosen = torch.randint(len(token), (2 * T,), generator=draw)
        token, expert = token[chosen], expert[chosen]
    if routing == "one expert":
        expert = expert * 0 + 5
    if routing == "empty experts":
        expert = expert % 3
    if routing == "no pairs":
        token, expert = token[:0], expert[:0]
    shapes = [(tokens, D), (len(token),), (E, (2 if gated else 1) * F, D), (E, D, F)]
    hidden, weight, up, down = (
        torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype) for shape in shapes
    )
    return hidden, token, expert, weight, up, down


def results(function, arguments: tuple[Tensor, ...], **options) -> list[Tensor]:
    hidden, token, expert, *rest = arguments
    leaves = [part.clone().requires_grad_() for part in (hidden, *rest)]
    out = function(leaves[0], token, expert, *leaves[1:], **options)
    # Without a pair nothing reaches the leaves; the naive loop would not even have a graph.
    if out.requires_grad:
        out.backward(torch.linspace(-1, 1, out.numel()).view_as(out).to(out.dtype))
    grads = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
    return [out, *grads]


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(
    # fp64: nothing but the order of sums of order 100; fp32: the same sums at its precision.
    ("dtype", "tolerance"),
    [(torch.float64, 1e-10), (torch.float32, 1e-5)],
    ids=["fp64", "fp32"],
)
def test_outputs_and_gradients_equal_the_loop(routing, dtype, tolerance) -> None:
    arguments = case(routing, dtype)
    found, expected = results(ragged_experts, arguments), results(naive, arguments)
    for ours, exact in zip(found, expected, strict=True):
        largest = max(1.0, float(exact.detach().abs().max())) if exact.numel() else 1.0
        torch.testing.assert_close(ours, exact, rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation, gated) -> None:
    arguments = case("ragged", torch.float64, gated)
    options = {"activation": activation, "gated": gated}
    found, expected = (
        results(ragged_experts, arguments, **options),
        results(naive, arguments, **options),
    )
    for ours, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_bf16_error_is_of_the_size_of_rounding(routing) -> None:
    half = case(routing, torch.bfloat16)
    exact = results(naive, tuple(x.double() if x.is_floating_point() else x for x in half))
    for value, reference in zip(results(ragged_experts, half), exact, strict=True):
        error = (value.double() - reference).norm()
        # bf16 keeps 8 bits; the roundings on the way (hidden, middle, rows) stay below 2 %.
        assert error <= 0.02 * reference.norm()


def test_padding_rows_of_bf16_leave_no_trace() -> None:
    """Fewer rows than `PAD` an expert: the windows of experts overlap, their results do not."""
    hidden, token, expert, weight, up, down = case("top-k", torch.bfloat16)
    whole = results(ragged_experts, (hidden, token, expert, weight, up, down))
    for e in range(E):
        own = expert == e
        alone = results(ragged_experts, (hidden, token[own], expert[own], weight[own], up, down))
        assert torch.equal(whole[3][e], alone[3][e])
        assert torch.equal(whole[4][e], alone[4][e])


def saved_elements(function, *leaves: Tensor) -> dict[torch.dtype, int]:
    """Elements by dtype that the graph of `function()` keeps, without the leaves themselves."""
    storages = {leaf.untyped_storage().data_ptr() for leaf in leaves}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in storages:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = function()
    assert out.requires_grad
    found: dict[torch.dtype, int] = {}
    for tensor in kept.values():
        count = tensor.untyped_storage().nbytes() // tensor.dtype.itemsize
        found[tensor.dtype] = found.get(tensor.dtype, 0) + count
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [16, 64])
def test_it_keeps_the_inputs_and_pre_activations_alone(width, dtype) -> None:
    """SonicMoE's claim: T*D + 2*N*F elements and indices, whatever N*D is."""
    hidden, token, expert, weight, _, _ = case("top-k", dtype)
    up, down = (torch.randn(E, *s).to(dtype).requires_grad_() for s in [(2 * F, width), (width, F)])
    hidden = torch.randn(T, width, dtype=dtype)
    source = hidden.clone().requires_grad_()
    # An input that some other layer made, so that keeping it counts.
    kept = saved_elements(
        lambda: ragged_experts(source * 1, token, expert, weight, up, down),
        *(source, up, down, weight, token),
    )
    slack = PAD - 1 if dtype == torch.bfloat16 else 0
    assert kept[dtype] == T * width + 2 * (len(token) + slack) * F
    assert kept[torch.int64] <= len(token) + E


def test_gradients_nobody_needs_are_not_computed() -> None:
    hidden, token, expert, weight, up, down = case("top-k", torch.float32)
    expected = results(naive, (hidden, token, expert, weight, up, down))
    for wanted in range(4):
        leaves = [hidden.clone(), weight.clone(), up.clone(), down.clone()]
        leaves[wanted].requires_grad_()
        out = ragged_experts(leaves[0], token, expert, *leaves[1:])
        out.backward(torch.linspace(-1, 1, out.numel()).view_as(out))
        assert [leaf.grad is not None for leaf in leaves] == [i == wanted for i in range(4)]
        torch.testing.assert_close(leaves[wanted].grad, expected[1 + wanted], rtol=1e-5, atol=1e-4)


def test_autocast_runs_the_products_in_its_dtype_and_gives_fp32_gradients() -> None:
    arguments = case("top-k", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out, *gradients = results(ragged_experts, arguments)
    assert out.dtype == torch.float32
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    reference = results(naive, arguments)[0]
    assert not torch.equal(out, reference)
    assert (out - reference).norm() / reference.norm() < 0.02


def test_dense_choices_are_pairs_in_their_order() -> None:
    hidden, token, expert, weight, up, down = case("top-k", torch.float32)
    dense = grouped_experts(hidden, expert.view(T, K), weight.view(T, K), up, down)
    assert torch.equal(dense, ragged_experts(hidden, token, expert, weight, up, down))


@pytest.mark.slow
def test_compiled_it_is_the_same() -> None:
    arguments = case("top-k", torch.float32)
    compiled = torch.compile(ragged_experts, fullgraph=True)
    for fast, plain in zip(
        results(compiled, arguments), results(ragged_experts, arguments), strict=True
    ):
        torch.testing.assert_close(fast, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "plain"), [("qwen3_moe", True), ("mixtral", True), ("gpt_oss", False)]
)
def test_banks_with_a_gate_of_their_own_are_left_alone(family, plain) -> None:
    from moekit.core.find import find_moe

    assert has_plain_banks(find_moe(build_tiny(family))[0].experts) is plain


@pytest.mark.parametrize("routing", ROUTINGS)
def test_dispatch_plan_is_a_padded_sort(routing: str) -> None:
    _, _, expert, *_ = case(routing, torch.float32)
    plan = dispatch_plan(expert, E)
    starts = torch.cat([torch.zeros(1, dtype=torch.int32), plan.ends[:-1]])
    assert torch.equal(torch.bincount(expert, minlength=E) > 0, plan.ends > starts)
    assert ((plan.ends - starts) % PAD == 0).all()
    assert len(plan.row_of_pair.unique()) == len(expert)
    inside = (plan.row_of_pair >= starts[expert]) & (plan.row_of_pair < plan.ends[expert])
    assert inside.all()
    assert torch.equal(plan.pair_of_row[plan.row_of_pair], torch.arange(len(expert)))
    padding = int((plan.pair_of_row == len(expert)).sum())
    assert padding == len(plan.pair_of_row) - len(expert)


def test_rows_do_not_depend_on_the_routing() -> None:
    experts = [case(r, torch.float32)[2] for r in ("top-k", "one expert")]
    assert len({len(dispatch_plan(e, E).pair_of_row) for e in experts}) == 1
