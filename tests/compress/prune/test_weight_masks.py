"""Masks within experts: which weights go, and the plan that applies them."""

from __future__ import annotations

import pytest
import torch

from moekit.compress.fitted import rewrite_of
from moekit.compress.live import apply_live
from moekit.compress.prune.weight_masks import MaskedExperts, mask_plan, masked
from moekit.core.errors import UserError
from moekit.core.plan import ExpertPlan
from moekit.core.spec import spec_of
from moekit.profile import profile
from tests.compress.prune.common import tiny_view, tokens


@pytest.fixture(scope="module")
def view():
    return tiny_view()


@pytest.fixture(scope="module")
def stats(view):
    return profile(view, [tokens()], sets=["default", "diagonal"])


def logits(view) -> torch.Tensor:
    with torch.no_grad():
        return view.model(tokens().ids).logits


def plan_for(view, method: str, protect=None, **options) -> ExpertPlan:
    return mask_plan(spec_of(view.model), method, options, protect or {}, None)


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 0.9])
def test_every_row_has_the_zeros_asked_for(sparsity):
    # Check (c) of MoE-Pruner.
    weight, squares = torch.randn(6, 40), torch.rand(40) + 0.1
    zeros = (masked(weight, squares, sparsity) == 0).sum(1)
    assert zeros.tolist() == [round(sparsity * 40)] * 6


def test_the_least_scores_go():
    weight = torch.tensor([[1.0, -4.0, 3.0, 2.0]])
    squares = torch.tensor([16.0, 0.25, 1.0, 1.0])
    # Scores 4, 2, 3, 2; of equal ones the later goes.
    assert masked(weight, squares, 0.5).tolist() == [[1.0, 0.0, 3.0, 0.0]]
    assert masked(weight, squares, 0.25).tolist() == [[1.0, -4.0, 3.0, 0.0]]
    # Nothing is known of the inputs: the size decides.
    assert masked(weight, torch.zeros(4), 0.5).tolist() == [[0.0, -4.0, 3.0, 0.0]]


def test_patterns_hold_among_neighbours():
    kept = masked(torch.randn(8, 16), torch.rand(16) + 0.1, pattern="2:4") != 0
    assert bool((kept.view(8, 4, 4).sum(-1) == 2).all())


def test_equal_gates_give_wanda_s_mask():
    # Check (a) of MoE-Pruner: with one choice of weight 1 a token, gates are all 1.
    view = tiny_view("qwen3_moe", num_experts_per_tok=1)
    stats = profile(view, [tokens()], sets=["diagonal"])
    for layer in view:
        for e in range(layer.num_experts):
            made = [
                MaskedExperts(ExpertPlan(), stats, gated=gated).expert(
                    layer.index, e, {e: 1.0}, layer.get_expert
                )
                for gated in (True, False)
            ]
            assert torch.equal(made[0].gate, made[1].gate)
            assert torch.equal(made[0].down, made[1].down)


def test_scaling_an_expert_s_gates_changes_nothing(view, stats):
    # Check (b) of MoE-Pruner; a power of two scales the sums exactly.
    expert = view[0].get_expert(0)
    plain = MaskedExperts(ExpertPlan(), stats)
    scaled = profile(view, [tokens()], sets=["diagonal"])
    for name in ("gated_input_sq", "gated_middle_sq"):
        scaled.held[0, name] = scaled.get(0, name) * 4
    other = MaskedExperts(ExpertPlan(), scaled)
    first, second = (r.expert(1, 0, {0: 1.0}, lambda _: expert) for r in (plain, other))
    assert torch.equal(first.up, second.up)
    assert torch.equal(first.down, second.down)


@pytest.mark.parametrize("method", ["moe-pruner", "wanda"])
def test_a_sparsity_of_zero_is_the_identity(method, view, stats, tmp_path):
    plan = plan_for(view, method, sparsity=0.0)
    expected = logits(view)
    with apply_live(view, plan, rewrite_of(plan, tmp_path, stats)):
        assert torch.equal(logits(view), expected)


def test_the_plan_zeroes_all_but_protected_experts(view, stats, tmp_path):
    plan = plan_for(view, "moe-pruner", {1: {3}}, sparsity=0.5)
    plan.save(tmp_path / "plan.json")
    again = ExpertPlan.load(tmp_path / "plan.json")
    before = [view[0].get_expert(e) for e in (2, 3)]
    with apply_live(view, again, rewrite_of(again, tmp_path, stats)):
        cut, kept = (view[0].get_expert(e) for e in (2, 3))
    for name, matrix in cut.tensors().items():
        assert float((matrix == 0).double().mean()) == pytest.approx(0.5), name
        original = before[0].tensors()[name]
        assert torch.equal(matrix[matrix != 0], original[matrix != 0])
    assert torch.equal(kept.down, before[1].down)


def test_gates_and_inputs_help(view, stats, tmp_path):
    # The reconstruction of the first layer beside masks by the size of weights alone.
    calls = []
    with view.observe(calls.append, layers=[0]):
        logits(view)
    call = calls[0]
    layer = view[0]

    def routed() -> torch.Tensor:
        with torch.no_grad():
            return layer.run_naive(call.hidden, call.ids, call.weights)

    expected, losses = routed(), {}
    by_size = profile(view, [tokens()], sets=["diagonal"])
    for name in ("gated_input_sq", "gated_middle_sq"):
        by_size.held[0, name] = torch.zeros_like(by_size.get(0, name))
    for label, source in (("inputs", stats), ("size", by_size)):
        plan = plan_for(view, "moe-pruner")
        with apply_live(view, plan, rewrite_of(plan, tmp_path, source)):
            losses[label] = float((routed() - expected).norm())
    assert losses["inputs"] < losses["size"]


def test_refusals(stats):
    weight, squares = torch.randn(2, 6), torch.ones(6)
    for options, message in (
        ({"sparsity": 1.0}, r"sparsity 1\.0"),
        ({"pattern": "2:4"}, "rows of 6 weights do not divide"),
        ({"pattern": "5:4"}, "not N:M"),
        ({"pattern": "half"}, "not N:M"),
    ):
        with pytest.raises(UserError, match=message):
            masked(weight, squares, **options)
    bare = profile(tiny_view(), [tokens()])
    with pytest.raises(UserError, match="gated_input_sq"):
        MaskedExperts(ExpertPlan(), bare)
