"""The view: what it finds, experts in one orientation, routing as a function."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from moekit.core.errors import UserError
from moekit.core.expert_weights import ExpertWeights
from moekit.core.find import find_moe
from moekit.core.view import MoEView
from tests.families.tiny import TINY, build_tiny, model_class


def test_positions_indices_and_names():
    view = MoEView(build_tiny("qwen3_moe"))
    assert len(view) == 2
    assert [layer.position for layer in view] == [0, 1]
    assert [layer.index for layer in view] == [1, 2]
    assert view[1].name == "model.layers.2.mlp"
    assert (view[0].num_experts, view[0].num_choices, view[0].top_k) == (8, 8, 2)


def test_find_works_on_the_meta_device():
    with torch.device("meta"):
        model = model_class("deepseek_v3")(TINY["deepseek_v3"]())
    assert [site.layer_index for site in find_moe(model)] == [1, 2]


def test_dense_model_is_refused():
    config = LlamaConfig(vocab_size=8, hidden_size=32, intermediate_size=16, num_hidden_layers=1)
    with pytest.raises(UserError, match="LlamaForCausalLM has no MoE layers"):
        MoEView(LlamaForCausalLM(config))


def test_shared_experts_are_found_beside_and_above_the_block():
    shared = {f: MoEView(build_tiny(f))[0].shared for f in ("qwen2_moe", "granitemoehybrid")}
    assert list(shared["qwen2_moe"]) == [
        "model.layers.1.mlp.shared_expert",
        "model.layers.1.mlp.shared_expert_gate",
    ]
    assert list(shared["granitemoehybrid"]) == ["model.layers.0.shared_mlp"]


def test_choices_without_experts_are_counted_apart():
    zaya, longcat = MoEView(build_tiny("zaya"))[0], MoEView(build_tiny("longcat_flash"))[0]
    assert (zaya.num_experts, zaya.num_choices) == (8, 9)
    assert (longcat.num_experts, longcat.num_choices) == (8, 12)
    hidden = torch.randn(3, 32)
    assert torch.equal(longcat.run_expert(9, hidden), hidden)


def test_shared_rows_of_the_router_are_no_choices():
    layer = MoEView(build_tiny("inkling"))[0]
    assert layer.router_weight.shape[0] > layer.num_choices == layer.num_experts == 8


def test_get_expert_is_a_copy_and_set_expert_writes():
    layer = MoEView(build_tiny("gpt_oss"))[0]
    expert = layer.get_expert(2)
    expert.gate.zero_()
    assert layer.get_expert(2).gate.any()
    layer.set_expert(2, expert)
    assert not layer.get_expert(2).gate.any()
    assert layer.get_expert(2).up.any()


def test_set_expert_refuses_other_shapes_and_parts():
    layer = MoEView(build_tiny("qwen3_moe"))[0]
    expert = layer.get_expert(0)
    with pytest.raises(UserError, match=r"expert 1: up is \[24, 32\], given \[23, 32\]"):
        layer.set_expert(1, ExpertWeights(expert.gate, expert.up[1:], expert.down))
    with pytest.raises(UserError, match="has gate, up, down; the given expert has up, down"):
        layer.set_expert(1, ExpertWeights(None, expert.up, expert.down))
    with pytest.raises(UserError, match="has experts 0 to 7, not 8"):
        layer.get_expert(8)


def test_route_flattens_and_takes_edited_logits():
    layer = MoEView(build_tiny("mixtral"))[0]
    hidden = torch.randn(2, 5, 32)
    flat, batched = layer.route(hidden.flatten(0, 1)), layer.route(hidden)
    assert flat.logits.shape == (10, 8)
    assert flat.ids.shape == flat.weights.shape == (10, 2)
    assert torch.equal(flat.ids, batched.ids)
    logits = torch.zeros(4, 8)
    logits[:, 3], logits[:, 6] = 2.0, 1.0
    routing = layer.route_from_logits(logits)
    assert routing.ids.tolist() == [[3, 6]] * 4
    expected = torch.tensor([2.0, 1.0]).softmax(0)  # over two of eight, then normalised
    torch.testing.assert_close(routing.weights[0], expected)


def test_route_is_the_plain_rule_inside_of_a_transform():
    model = build_tiny("mixtral")
    view, hidden = MoEView(model), torch.randn(6, 32)
    plain = view[0].route(hidden)
    with view.ban_experts([int(plain.ids[0, 0])]):
        assert torch.equal(view[0].route(hidden).ids, plain.ids)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "doge"])
def test_route_without_some_experts_is_that_of_a_ban(family: str):
    view, inputs = MoEView(build_tiny(family)), torch.arange(3, 12).unsqueeze(0)
    calls = []
    with view.observe(calls.append, logits=True, layers=[0]), torch.no_grad():
        view.model(input_ids=inputs)
    banned = [int(calls[0].ids[0, 0])]
    with view.ban_experts({0: banned}), view.observe(calls.append, layers=[0]), torch.no_grad():
        view.model(input_ids=inputs)
    plain, without = calls
    found = view[0].route_from_logits(plain.logits, plain.router_input, banned)
    assert not torch.isin(found.ids, torch.tensor(banned)).any()
    assert torch.equal(found.ids, without.ids)
    assert torch.equal(found.weights, without.weights)


@pytest.mark.parametrize("family", ["afmoe", "zaya"])
def test_route_feeds_routers_that_insist_on_a_batch(family: str):
    layer = MoEView(build_tiny(family))[0]
    assert layer.route(torch.randn(5, 32)).ids.shape == (5, layer.top_k)


def test_route_asks_for_what_the_block_does_not_know():
    layer = MoEView(build_tiny("deepseek_v4"))[0]
    with pytest.raises(UserError, match="the router also needs 'input_ids'"):
        layer.route(torch.randn(3, 32))
    ids = torch.tensor([4, 5, 6])
    routing = layer.route(torch.randn(3, 32), input_ids=ids)
    assert torch.equal(routing.ids, layer.router.tid2eid[ids])


@pytest.mark.parametrize("family", ["deepseek_v3", "ernie4_5_moe", "afmoe", "lfm2_moe", "zaya"])
def test_correction_bias_is_found_in_the_router_or_the_block(family: str):
    layer = MoEView(build_tiny(family))[0]
    assert layer.correction_bias.shape == (layer.num_choices,)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "jetmoe"])
def test_other_biases_are_no_correction_bias(family: str):
    assert MoEView(build_tiny(family))[0].correction_bias is None


def test_router_bias_is_part_of_the_logits():
    layer = MoEView(build_tiny("gpt_oss"))[0]
    hidden = torch.randn(3, 32)
    expected = nn.functional.linear(hidden, layer.router_weight, layer.router_bias)
    assert torch.equal(layer.route(hidden).logits, expected)
    assert MoEView(build_tiny("mixtral"))[0].router_bias is None
