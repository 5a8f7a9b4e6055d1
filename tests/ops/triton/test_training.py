"""The kernels for training beside the loop; without a GPU in Triton's interpreter."""

import pytest
import torch

pytest.importorskip("triton")

from moekit.ops import lean_experts
from moekit.ops.activations import ACTIVATIONS
from moekit.ops.grouped import ragged_experts
from tests.ops.test_grouped import ROUTINGS, case, naive, results, saved_elements

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """The kernels wherever the tensors are, and NaN where nothing was written."""
    monkeypatch.setattr(lean_experts, "has_kernels", lambda hidden: True)
    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like

    def poison(made):
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))


def check(arguments, tolerance, **options) -> None:
    exact = tuple(x.double() if x.is_floating_point() else x for x in arguments)
    found = results(ragged_experts, tuple(x.to(DEVICE) for x in arguments), **options)
    for ours, expected in zip(found, results(naive, exact, **options), strict=True):
        error = (ours.cpu().double() - expected).norm()
        assert error <= tolerance * expected.norm(), (error, expected.norm())


@pytest.mark.parametrize("routing", ROUTINGS)
def test_outputs_and_gradients_equal_the_loop(routing) -> None:
    check(case(routing, torch.float32), 1e-5)


def test_bf16_error_is_of_the_size_of_rounding() -> None:
    # bf16 keeps 8 bits; the roundings on the way (hidden, middle, rows) stay below 2 %.
    check(case("ragged", torch.bfloat16), 0.02)


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation, gated) -> None:
    check(case("one token", torch.float32, gated), 1e-5, activation=activation, gated=gated)


def test_more_rows_than_a_block_has() -> None:
    hidden, token, expert, weight, up, down = case("one expert", torch.float32)
    assert len(token) > 64
    check((hidden, token, expert * 0, weight, up[:1], down[:1]), 1e-5)


def test_they_keep_the_inputs_and_pre_activations_alone() -> None:
    hidden, token, expert, weight, up, down = (x.to(DEVICE) for x in case("top-k", torch.float32))
    source = hidden.clone().requires_grad_()
    banks = [bank.requires_grad_() for bank in (up, down)]
    kept = saved_elements(
        lambda: ragged_experts(source * 1, token, expert, weight, *banks),
        *(source, *banks, weight, token),
    )
    assert kept[torch.float32] == hidden.numel() + len(token) * up.shape[1]
