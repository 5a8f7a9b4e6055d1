"""ElasticMoE on whole models: draws of experts, top-k and depth, and sub-models cut out."""

import copy

import pytest
import torch

from moekit.core.errors import UserError
from moekit.layers import MoekitConfig, MoekitForCausalLM, RouterContext
from moekit.layers.elastic_depth import spaced_layers
from moekit.layers.submodel import cut_submodel

ELASTIC = {"name": "elastic", "experts": [4, 8], "top_ks": [1, 2], "bias_rate": 0.01}
MOE = {
    "router": ELASTIC,
    "top_k": 2,
    "experts": {"type": "swiglu", "count": 8, "expert_width": 16},
    "layers": {"first": 1},
}
IDS = torch.randint(48, (2, 7), generator=torch.Generator().manual_seed(0))


def model(router: dict | None = None, **fields) -> MoekitForCausalLM:
    torch.manual_seed(0)
    moe = {**copy.deepcopy(MOE), "router": router or ELASTIC}
    config = MoekitConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        initializer_range=0.3,
        moe=moe,
        **fields,
    )
    return MoekitForCausalLM(config).eval()


def test_evenly_spaced_layers():
    assert spaced_layers(1, 8) == [0]
    assert spaced_layers(2, 8) == [0, 7]
    assert spaced_layers(4, 8) == [0, 2, 5, 7]
    assert spaced_layers(8, 8) == list(range(8))


def test_the_full_draw_is_the_plain_model():
    full = model(
        {"name": "elastic", "full": 1.0, "bias_rate": 0.0},
        elastic_depth={"depths": [2], "full": 1.0},
    )
    plain = model({"name": "softmax-raw"})
    names = {
        name.replace(".score.linear.", ".score."): value
        for name, value in full.state_dict().items()
    }
    plain.load_state_dict(names)
    assert torch.equal(full.train()(IDS).logits, plain(IDS).logits)


def test_depths_of_the_two_axes_are_drawn_together_with_the_full_model():
    elastic = model({**ELASTIC, "full": 0.5}, elastic_depth={"depths": [2, 3], "full": 0.5}).train()
    seen = set()
    for step in range(40):
        routings = elastic(IDS, router_context=RouterContext(1, 1, step=step)).routings
        layers = tuple(routing.layer for routing in routings)
        kept = int((routings[0].scores[0] > 0).sum())
        seen.add((layers, kept, routings[0].top_k))
    assert {layers for layers, _, _ in seen} == {(1, 2, 3), (3,), (2, 3)}
    assert all(kept in (4, 8) and top_k in (1, 2) for _, kept, top_k in seen)


def test_a_cut_out_model_computes_what_the_masked_one_does():
    whole = model(
        {**ELASTIC, "eval_experts": 4, "eval_top_k": 1},
        elastic_depth={"depths": [2], "eval": 3},
    )
    for name, buffer in whole.named_buffers():
        if name.endswith("expert_bias"):
            buffer.copy_(torch.linspace(-0.1, 0.2, 8))
    part = cut_submodel(whole, experts=4, top_k=1, depth=3)
    assert part.config.num_hidden_layers == 3
    assert sum(p.numel() for p in part.parameters()) < sum(p.numel() for p in whole.parameters())
    # The softmax runs over 4 logits in place of 8 of which 4 are minus infinity.
    torch.testing.assert_close(part(IDS).logits, whole(IDS).logits, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_cut_or_drawn_is_told():
    with pytest.raises(UserError, match="train with 'elastic'"):
        cut_submodel(model({"name": "softmax-raw"}))
    with pytest.raises(UserError, match="9 is not between 1 and 4 layers"):
        model(elastic_depth={"depths": [9]})
    with pytest.raises(UserError, match="elastic_depth is not written as"):
        model(elastic_depth={"depth": 2})
