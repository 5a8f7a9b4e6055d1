"""The grouped experts against a loop over tokens and choices, outputs and gradients."""

import pytest
import torch
from torch import Tensor

from moekit.ops.grouped import PAD, dispatch_plan, grouped_experts, swiglu

T, D, F, E, K = 37, 16, 24, 8, 3
ROUTINGS = ["random", "one expert", "one token", "empty experts"]


def naive(hidden: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    rows = []
    for token in range(len(hidden)):
        total = torch.zeros(hidden.shape[1], dtype=hidden.dtype)
        for choice in range(ids.shape[1]):
            expert = ids[token, choice]
            wide = gate_up[expert] @ hidden[token]
            total = total + weights[token, choice] * (down[expert] @ swiglu(wide))
        rows.append(total)
    return torch.stack(rows)


def case(routing: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    tokens = 1 if routing == "one token" else T
    ids = torch.rand(tokens, E, generator=generator).argsort(-1)[:, :K]
    if routing == "one expert":
        ids = ids * 0 + 5
    if routing == "empty experts":
        ids = ids % 3
    shapes = [(tokens, D), (tokens, K), (E, 2 * F, D), (E, D, F)]
    hidden, weights, gate_up, down = (
        torch.randn(*shape, generator=generator).to(dtype) for shape in shapes
    )
    return hidden, ids, weights.softmax(-1), gate_up, down


def results(function, arguments: tuple[Tensor, ...]) -> list[Tensor]:
    hidden, ids, *rest = arguments
    leaves = [part.clone().requires_grad_() for part in (hidden, *rest)]
    out = function(leaves[0], ids, *leaves[1:])
    # A dense upstream gradient: grouped_mm's backward rejects the expanded one of a plain sum.
    out.backward(torch.linspace(-1, 1, out.numel()).view_as(out).to(out.dtype))
    return [out, *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("routing", ROUTINGS)
def test_outputs_and_gradients_equal_the_loop(routing: str) -> None:
    arguments = case(routing, torch.float32)
    for fast, slow in zip(
        results(grouped_experts, arguments), results(naive, arguments), strict=True
    ):
        # Sums of up to 37 * 3 products of order 10 in another order.
        torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-4)


def test_bf16_error_is_of_the_size_of_rounding() -> None:
    exact = results(naive, case("random", torch.float32))
    half = results(grouped_experts, case("random", torch.bfloat16))
    for value, reference in zip(half, exact, strict=True):
        error = (value.float() - reference).norm() / reference.norm()
        # bf16 keeps 8 bits; three roundings on the way (input, hidden, output) stay below 2 %.
        assert error < 0.02


def test_autocast_runs_the_products_in_its_dtype_and_gives_fp32_gradients() -> None:
    arguments = case("random", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out, *gradients = results(grouped_experts, arguments)
    assert out.dtype == torch.float32
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    reference = results(naive, arguments)[0]
    assert not torch.equal(out, reference)
    assert (out - reference).norm() / reference.norm() < 0.02


@pytest.mark.parametrize("routing", ROUTINGS)
def test_dispatch_plan_is_a_padded_sort(routing: str) -> None:
    ids = case(routing, torch.float32)[1]
    plan = dispatch_plan(ids, E)
    flat = ids.reshape(-1)
    starts = torch.cat([torch.zeros(1, dtype=torch.int32), plan.ends[:-1]])
    assert torch.equal(torch.bincount(flat, minlength=E) > 0, plan.ends > starts)
    assert ((plan.ends - starts) % PAD == 0).all()
    assert len(plan.row_of_pair.unique()) == len(flat)
    inside = (plan.row_of_pair >= starts[flat]) & (plan.row_of_pair < plan.ends[flat])
    assert inside.all()
    assert torch.equal(plan.pair_of_row[plan.row_of_pair], torch.arange(len(flat)))
    assert int((plan.pair_of_row == len(flat)).sum()) == len(plan.pair_of_row) - len(flat)
    assert torch.equal(plan.token_of_row[plan.row_of_pair], torch.arange(len(flat)) // K)


def test_rows_do_not_depend_on_the_routing() -> None:
    sizes = {len(dispatch_plan(case(r, torch.float32)[1], E).pair_of_row) for r in ROUTINGS[:2]}
    assert len(sizes) == 1
