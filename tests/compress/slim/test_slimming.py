"""Slimming to the full width is nothing; useless neurons go first; distillation helps."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeForCausalLM

from moekit.compress.live import apply_live
from moekit.compress.slim.distillation import (
    likely_tokens,
    truncated_cross_entropy,
    truncated_divergence,
)
from moekit.compress.slim.slimming import sensitivity, slim, stage_widths
from moekit.core.collect import Batch
from moekit.core.convert import convert
from moekit.core.errors import UserError
from moekit.core.view import MoEView
from tests.families.tiny import build_tiny
from tests.models import tiny_config

WIDTH = 16


def batches(count: int = 3) -> list[Batch]:
    source = torch.Generator().manual_seed(0)
    return [Batch(torch.randint(3, 60, (2, 12), generator=source)) for _ in range(count)]


@pytest.fixture
def view() -> MoEView:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MoEView(Qwen3MoeForCausalLM(tiny_config(vocab_size=64)).eval())


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=batches()[0].ids).logits


def test_full_width_changes_no_bit(view: MoEView) -> None:
    before = {name: p.clone() for name, p in view.model.named_parameters()}
    found = slim(view, batches(), WIDTH, steps=3)
    assert not found.plan.tensors
    assert all(torch.equal(p, before[name]) for name, p in view.model.named_parameters())


def test_useless_neurons_go_first_and_without_loss(view: MoEView) -> None:
    with torch.no_grad():
        for layer in view:
            for e in range(layer.num_experts):
                layer.expert_views(e).down[:, [2, 7, 11]] = 0
    before = logits(view.model)
    found = slim(view, batches(), WIDTH - 3, stages=1, steps=0)
    kept = [n for n in range(WIDTH) if n not in (2, 7, 11)]
    assert all(order.tolist() == kept for order in found.plan.tensors.neurons.values())
    assert torch.equal(logits(view.model), before)
    with apply_live(view, found.plan):
        # The same neurons, moved together, summed in another order.
        assert torch.allclose(logits(view.model), before, atol=1e-4)


def test_sensitivity_is_the_first_order_change(view: MoEView) -> None:
    """Removing a neuron changes the loss by about its sensitivity, where that is small."""
    teacher = copy.deepcopy(view.model)
    text = batches(1)
    scores = sensitivity(view, text, teacher)

    @torch.no_grad()
    def loss() -> float:
        ids, p = likely_tokens(teacher(input_ids=text[0].ids).logits)
        return float(
            truncated_cross_entropy(view.model(input_ids=text[0].ids).logits, ids, p).mean()
        )

    expert, scale = view[1].expert_views(0), 1e-2
    start, changes = loss(), []
    for neuron in range(WIDTH):
        parts = [expert.gate[neuron], expert.up[neuron], expert.down[:, neuron]]
        kept = [part.clone() for part in parts]
        for part in parts:
            part.mul_(1 - scale)
        changes.append(abs(loss() - start) / scale)
        for part, old in zip(parts, kept, strict=True):
            part.copy_(old)
    # Second-order terms are of the size of `scale`, rounding of the loss some 1e-7 / scale.
    assert torch.allclose(torch.tensor(changes), scores[1][0], rtol=0.1, atol=1e-3)


def test_normalised_loss_has_no_gradient_at_the_start(view: MoEView) -> None:
    found = view.model(input_ids=batches()[0].ids).logits.detach().requires_grad_(True)
    ids, probabilities = likely_tokens(found.detach())
    (flat,) = torch.autograd.grad(truncated_divergence(found, ids, probabilities).mean(), found)
    (steep,) = torch.autograd.grad(truncated_cross_entropy(found, ids, probabilities).mean(), found)
    assert flat.norm() < 1e-6 < 1e-3 < steep.norm()


def test_training_between_stages_lowers_the_divergence(view: MoEView, tmp_path: Path) -> None:
    found = slim(view, batches(), 8, stages=2, steps=25, learning_rate=3e-3)
    assert found.widths == [11, 8]
    for losses in found.losses:
        assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    # What was trained is what is written, in narrower experts that stock classes load.
    expected = logits(view.model)
    view.model.save_pretrained(tmp_path / "trained")
    convert(tmp_path / "trained", tmp_path / "out", plan=found.plan)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert loaded.config.moe_intermediate_size == 8
    assert torch.allclose(logits(loaded), expected, atol=1e-4)


@pytest.mark.parametrize("family", ["gpt_oss", "nemotron_h", "mixtral"])
def test_families_of_other_storage(family: str) -> None:
    view = MoEView(build_tiny(family))
    found = slim(view, batches(1), 8, stages=1, steps=1)
    assert {len(order) for order in found.plan.tensors.neurons.values()} == {8}
    with torch.no_grad():
        assert view.model(input_ids=batches(1)[0].ids).logits.isfinite().all()


def test_stage_widths() -> None:
    assert stage_widths(64, 8, 3) == [32, 16, 8]
    assert stage_widths(64, 64, 2) == [64, 64]
    with pytest.raises(UserError, match="1 to 64"):
        stage_widths(64, 65, 1)
    with pytest.raises(UserError, match="at least 1"):
        stage_widths(64, 8, 0)


def test_refusals(view: MoEView) -> None:
    with pytest.raises(UserError, match="0 sequences"):
        slim(view, [], 4)
    with pytest.raises(UserError, match="code of its own"):
        slim(MoEView(build_tiny("jetmoe")), batches(1), 4)
