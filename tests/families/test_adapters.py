"""What is particular to single families outside of the seam."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import VitPoseBackbone, VitPoseBackboneConfig

from moekit.core.layer import MoELayer
from moekit.core.port import SeamCall
from moekit.core.routing_rule import Routing
from moekit.core.view import MoEView
from tests.families.tiny import build_tiny, tiny_inputs


def observed(view: MoEView, **inputs: Tensor) -> list[SeamCall]:
    calls: list[SeamCall] = []
    with view.observe(calls.append, logits=True), torch.no_grad():
        view.model(**inputs)
    return calls


def _third(layer: MoELayer, routing: Routing, hidden: Tensor) -> Routing:
    return Routing(None, routing.weights / 2, torch.full_like(routing.ids, 2))


def test_doge_chooses_by_the_sum_of_two_keys():
    model = build_tiny("doge")
    view = MoEView(model)
    for call in observed(view, **tiny_inputs("doge", model)):
        block = call.layer.block
        x, y = block.router_gate(call.router_input).reshape(2, -1, block.num_keys)
        expected = torch.stack([x[:, i] + y[:, j] for i in range(4) for j in range(4)], dim=-1)
        assert torch.equal(call.logits, expected)
        best, ids = expected.topk(call.layer.top_k)
        assert torch.equal(call.ids, ids)
        torch.testing.assert_close(call.weights, best.softmax(-1))
        routing = call.layer.route(call.router_input)
        assert torch.equal(routing.ids, call.ids)
        assert torch.equal(routing.weights, call.weights)


def test_doge_ban_takes_the_next_best_sum():
    model = build_tiny("doge")
    view = MoEView(model)
    inputs = tiny_inputs("doge", model)
    (plain, *_) = observed(view, **inputs)
    banned = int(plain.ids.flatten().mode().values)
    with view.ban_experts({0: [banned]}):
        (call, *_) = observed(view, **inputs)
    allowed = plain.logits.index_fill(-1, torch.tensor([banned]), float("-inf"))
    best, ids = allowed.topk(call.layer.top_k)
    assert torch.equal(call.ids, ids)
    torch.testing.assert_close(call.weights, best.softmax(-1))


def test_switch_transformers_drops_tokens_beyond_the_capacity():
    model = build_tiny("switch_transformers")
    view = MoEView(model)
    for layer in view:
        layer.router.expert_capacity = 1
    call = observed(view, **tiny_inputs("switch_transformers", model))[0]
    dropped = call.ids[:, 0] == -1
    assert 0 < dropped.sum() < len(dropped)
    assert not call.weights[dropped].any()
    for sequence in call.ids.view(2, -1):
        kept = sequence[sequence >= 0]
        assert len(kept) == len(kept.unique())
    with torch.no_grad():
        routed = view[0].route(call.router_input)
    assert torch.equal(routed.ids, call.ids)


def test_nllb_moe_runs_two_experts_whatever_its_router_says():
    """Fails when transformers mends its experts; then the adapter must pass the router's ids on."""
    model = build_tiny("nllb_moe")
    view = MoEView(model)
    for call in observed(view, **tiny_inputs("nllb_moe", model)):
        assert call.logits.argmax(-1).unique().numel() > 2
        assert set(call.ids.unique().tolist()) <= {-1, 0, 1}


def test_llama4_weighs_the_input_of_an_expert():
    layer = MoEView(build_tiny("llama4"))[0]
    hidden = torch.randn(3, 32)
    weight = torch.tensor(0.5)
    weighted = layer.run_expert(2, hidden, weight)
    torch.testing.assert_close(weighted, layer.run_expert(2, hidden * 0.5))
    assert not torch.allclose(weighted, layer.run_expert(2, hidden) * 0.5, atol=1e-4)


def test_vitpose_backbone_takes_the_expert_of_the_data_set():
    config = VitPoseBackboneConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=(32, 32),
        patch_size=(8, 8),
        num_experts=3,
        part_features=8,
        out_indices=[-1],
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = VitPoseBackbone(config).eval()
        inputs = {"pixel_values": torch.randn(2, 3, 32, 32), "dataset_index": torch.tensor([0, 2])}
    view = MoEView(model)
    assert (view[0].num_experts, view[0].top_k, view[0].router) == (3, 1, None)
    calls: list[SeamCall] = []
    with torch.no_grad():
        expected = model(**inputs).feature_maps[0]
        with view.observe(calls.append):
            assert torch.equal(model(**inputs).feature_maps[0], expected)
        with view.use_backend("naive"):
            # float32 sums in another order
            torch.testing.assert_close(
                model(**inputs).feature_maps[0], expected, rtol=1e-5, atol=1e-5
            )
        with view.transform_routing(_third, on="selection"):
            changed = model(**inputs).feature_maps[0]
            with view.use_backend("naive"):
                torch.testing.assert_close(
                    changed, model(**inputs).feature_maps[0], rtol=1e-5, atol=1e-5
                )
    assert not torch.equal(changed, expected)
    assert calls[0].ids.view(2, -1).unique(dim=1).tolist() == [[0], [2]]
    expert = view[1].get_expert(2)
    assert expert.down.shape == (8, 128)
    view[1].set_expert(2, expert)
    with torch.no_grad():
        assert torch.equal(model(**inputs).feature_maps[0], expected)
