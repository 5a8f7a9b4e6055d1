"""Vectors of ones run the main experts alone; gradients reach auxiliary ones; training helps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Qwen3MoeForCausalLM

from moekit.compress.condense.compressed_experts import (
    CompressedExperts,
    compressed_experts,
    train_compressed_experts,
)
from moekit.core.errors import UserError
from moekit.core.routing_rule import Routing
from moekit.core.view import MoEView
from tests.families.tiny import build_tiny
from tests.models import tiny_config

IDS = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def view() -> MoEView:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = tiny_config(num_experts=6, num_experts_per_tok=3, vocab_size=64)
        return MoEView(Qwen3MoeForCausalLM(config).eval())


def main_only(layer, routing: Routing, hidden) -> Routing:
    """The best of every token alone, with its own weight."""
    best = routing.weights.argmax(-1, keepdim=True)
    ids = torch.full_like(routing.ids, -1).scatter(1, best, routing.ids.gather(1, best))
    weights = torch.zeros_like(routing.weights).scatter(1, best, routing.weights.gather(1, best))
    return Routing(routing.logits, weights, ids)


@torch.no_grad()
def test_ones_run_the_main_experts_alone(view: MoEView) -> None:
    made = CompressedExperts(view, 2)
    with made.active():
        found = view.model(input_ids=IDS).logits
    with view.transform_routing(main_only, on="selection"), view.use_backend("naive"):
        expected = view.model(input_ids=IDS).logits
    # The sum over tokens' experts is in another order.
    assert torch.allclose(found, expected, atol=1e-4)


def test_ones_change_no_bit_of_the_main_experts(view: MoEView) -> None:
    """Whatever the auxiliary choices are: their vectors are ones, so they cannot matter."""
    layer = view[0]
    hidden = torch.randn(7, 32, generator=torch.Generator().manual_seed(1))
    weights = torch.tensor([[0.5, 0.3, 0.2]]).expand(7, 3)
    made = CompressedExperts(view, 2)
    outputs = []
    for auxiliary in ([1, 2], [4, 5]):
        ids = torch.tensor([[0, *auxiliary]]).expand(7, 3)
        with made.active(), torch.no_grad():
            outputs.append(layer.experts(hidden, ids, weights))
    assert torch.equal(*outputs)


def test_gradients_reach_the_auxiliary_experts_only(view: MoEView) -> None:
    made = CompressedExperts(view, 2)
    hidden = torch.randn(7, 32, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[0, 1, 2]]).expand(7, 3)
    weights = torch.tensor([[0.5, 0.3, 0.2]]).expand(7, 3)
    with made.active():
        view[0].experts(hidden, ids, weights).square().sum().backward()
    for vector in made.vectors[0].values():
        reached = vector.grad.abs().sum(1) > 0
        assert reached.tolist() == [False, True, True, False, False, False]


@torch.no_grad()
def test_vectors_of_a_main_expert_do_nothing(view: MoEView) -> None:
    made = CompressedExperts(view, 1)
    hidden = torch.randn(3, 32)
    ids, weights = torch.tensor([[0, 1, 2]] * 3), torch.tensor([[0.5, 0.3, 0.2]] * 3)
    with made.active():
        before = view[0].experts(hidden, ids, weights)
        for vector in made.vectors[0].values():
            vector[:2] = 7
        assert torch.equal(view[0].experts(hidden, ids, weights), before)
        made.vectors[0]["up"][2] = 7
        assert not torch.equal(view[0].experts(hidden, ids, weights), before)


def test_training_lowers_the_loss_and_leaves_the_model(view: MoEView, tmp_path: Path) -> None:
    with torch.no_grad():
        expected = view.model(input_ids=IDS).logits
    made, losses = train_compressed_experts(view, [IDS], 2, passes=12, learning_rate=0.05)
    assert losses[-1] < losses[0] - 0.05
    with torch.no_grad():
        assert torch.equal(view.model(input_ids=IDS).logits, expected)
        made.save(tmp_path / "vectors.safetensors")
        with made.active():
            trained = view.model(input_ids=IDS).logits
        with compressed_experts(view, file=tmp_path / "vectors.safetensors"):
            assert torch.equal(view.model(input_ids=IDS).logits, trained)


@pytest.mark.parametrize("family", ["gpt_oss", "nemotron_h", "mixtral"])
def test_families_of_other_storage(family: str) -> None:
    view = MoEView(build_tiny(family))
    made = CompressedExperts(view, 1)
    with made.active(), torch.no_grad():
        assert view.model(input_ids=IDS).logits.isfinite().all()


def test_refusals(view: MoEView, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="1 to 2 of them can be auxiliary, not 3"):
        CompressedExperts(view, 3)
    with pytest.raises(UserError, match="0 sequences"):
        train_compressed_experts(view, [], 1)
    with pytest.raises(UserError, match="code of its own"):
        CompressedExperts(MoEView(build_tiny("jetmoe")), 1)
    (tmp_path / "bad").write_text("x")
    with pytest.raises(UserError, match="cannot be read"):
        CompressedExperts.load(tmp_path / "bad", view)
