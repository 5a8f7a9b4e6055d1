"""The spec of every family agrees with its built model: parameters, shapes and routing rule."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import VitPoseBackbone, VitPoseBackboneConfig

from moekit.core.family_table import RULES
from moekit.core.layer import MoELayer
from moekit.core.layer_spec import LayerSpec
from moekit.core.routing_rule import Routing
from moekit.core.spec import spec_from_config
from moekit.core.view import MoEView
from tests.families.routing_oracle import claimed_weights_of
from tests.families.scan import UNDECORATED, decorated_families
from tests.families.tiny import SKIP, TINY, build_tiny

TOKENS = 64

# Families whose block is no affine function of what its experts return, or has no experts to
# replace, so that a factor cannot be read off it.
NOT_LINEAR_IN_EXPERTS = {
    "axk1": "a norm follows",
    "diffusion_gemma": "the block is the decoder layer, with a norm after the experts",
    "doge": "the block computes its experts itself",
    "gemma4": "the block is the decoder layer, with a norm after the experts",
    "jetmoe": "the block computes its experts itself",
    "llama4": "the experts return one row per token and expert",
    "muse_spark": "a projection follows",
    "nllb_moe": "the factor is inside the experts",
}


@pytest.mark.parametrize("family", TINY)
def test_counts_equal_the_built_model(family: str):
    spec = spec_from_config(TINY[family]())
    model = build_tiny(family)
    params = spec.params
    assert params.total == sum(p.numel() for p in model.parameters())
    assert params.total == sum(params.parts.values())
    assert params.buffers == _persistent_elements(model)
    assert params.active < params.total
    assert params.active_no_embedding == params.active - params.embedding
    assert spec.architecture == type(model).__name__
    assert json.loads(spec.to_json())["params"]["total"] == params.total


@pytest.mark.parametrize("family", TINY)
def test_layers_equal_the_view(family: str):
    spec = spec_from_config(TINY[family]())
    view = MoEView(build_tiny(family))
    assert len(spec.per_layer) == len(view)
    for claimed, layer in zip(spec.per_layer, view, strict=True):
        expert = layer.get_expert(claimed.num_experts - 1)
        assert (claimed.path, claimed.layer_index) == (layer.name, layer.index)
        assert (claimed.num_experts, claimed.top_k) == (layer.num_experts, layer.top_k)
        assert claimed.num_experts + claimed.num_null_experts == layer.num_choices
        assert expert.up.shape == (claimed.expert_width, claimed.hidden_size)
        assert claimed.has_gate == (expert.gate is not None)
        assert claimed.has_bias == (expert.down_bias is not None)
        assert claimed.has_correction_bias == (layer.correction_bias is not None)


@pytest.mark.parametrize("family", TINY)
def test_routing_rule_equals_the_router(family: str):
    _check_rules(family, TINY[family]())


@pytest.mark.parametrize(
    "family", [f for f in TINY if hasattr(TINY[f]().get_text_config(), "norm_topk_prob")]
)
def test_routing_rule_follows_the_normalisation_flag(family: str):
    config = TINY[family]()
    text = config.get_text_config()
    text.norm_topk_prob = not text.norm_topk_prob
    _check_rules(family, config)


@pytest.mark.parametrize("family", [f for f in TINY if f not in NOT_LINEAR_IN_EXPERTS])
def test_output_scaling_equals_the_block(family: str):
    config = TINY[family]()
    claimed = spec_from_config(config).per_layer[-1]
    model = build_tiny(family)
    layer = MoEView(model)[-1]
    hidden = torch.randn(1, TOKENS, layer.router_width)
    context = {"input_ids": torch.arange(TOKENS)[None]} if claimed.selection == "hash" else {}
    added = torch.randn(TOKENS, claimed.hidden_size)
    with torch.no_grad():
        base, moved = (
            _block_output(layer, hidden, context, replacement)
            for replacement in (torch.zeros_like(added), added)
        )
    torch.testing.assert_close(
        (moved - base).view(TOKENS, -1), added * claimed.output_scaling, rtol=1e-4, atol=1e-5
    )


def test_vitpose_backbone():
    config = VitPoseBackboneConfig(
        num_experts=4, num_hidden_layers=2, hidden_size=24, part_features=8
    )
    spec = spec_from_config(config)
    model = VitPoseBackbone(config)
    assert spec.total_params == sum(p.numel() for p in model.parameters())
    assert (spec.num_experts, spec.top_k, spec.moe_layers) == (4, 1, (0, 1))
    layer = spec.per_layer[0]
    assert (layer.score, layer.selection) == ("none", "caller")
    # The experts are linear maps from the block's inner width, with a bias, to their features.
    assert (layer.expert_width, layer.hidden_size) == (4 * 24, 8)
    assert layer.params_per_expert == 4 * 24 * 8 + 8


def test_nllb_moe_scales_inside_its_experts():
    claimed = spec_from_config(TINY["nllb_moe"]()).per_layer[-1]
    layer = MoEView(build_tiny("nllb_moe"))[-1]
    hidden = torch.randn(TOKENS, claimed.hidden_size)
    first = torch.zeros(TOKENS, claimed.num_experts, dtype=torch.long)
    first[:, 1] = 1
    with torch.no_grad():
        output = layer.experts(hidden, first, first.float())
        expected = layer.experts["expert_1"](hidden) * claimed.output_scaling
    torch.testing.assert_close(output, expected)


def test_every_family_has_a_rule():
    # A family of a newer transformers gets score "unknown" until it has a row.
    assert decorated_families() | UNDECORATED == RULES.keys() | SKIP.keys()


def _check_rules(family: str, config: Any) -> None:
    spec = spec_from_config(config)
    view = MoEView(build_tiny(family, config=config))
    for claimed, layer in zip(spec.per_layer, view, strict=True):
        if claimed.selection == "product_key":
            continue  # two keys choose an expert together: tests of the view cover it
        hidden, context = _router_inputs(claimed, layer)
        with torch.no_grad():
            routing = layer.route(hidden, **context)
            expected = claimed_weights_of(claimed, layer, hidden, routing.logits, context)
            weights = _dense_weights(family, layer, hidden, routing)
        experts = slice(0, claimed.num_experts)
        # float32 sums of a few terms in another order
        torch.testing.assert_close(
            weights[:, experts], expected[:, experts].float(), rtol=1e-5, atol=1e-6
        )
        assert (weights[:, experts] > 0).any(0).sum() > claimed.top_k, "degenerate routing"


def _block_output(
    layer: MoELayer, hidden: Tensor, context: dict[str, Tensor], experts_output: Tensor
) -> Tensor:
    def replace(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return experts_output.view(output.shape)

    handle = layer.experts.register_forward_hook(replace)
    try:
        output = layer.block(hidden, **context)
    finally:
        handle.remove()
    return output[0] if isinstance(output, tuple) else output


def _dense_weights(family: str, layer: MoELayer, hidden: Tensor, routing: Routing) -> Tensor:
    if family == "nllb_moe":
        # Its experts misread the router's answer (see the family's module), so ask the router.
        return layer.router(hidden)[1]
    # Unused choices have id -1 and land in the last column, which is no choice.
    dense = torch.zeros(TOKENS, layer.num_choices + 1)
    return dense.scatter_add(-1, routing.ids % dense.shape[-1], routing.weights.float())


def _router_inputs(claimed: LayerSpec, layer: MoELayer) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(claimed.layer_index)
    hidden = torch.randn(TOKENS, layer.router_width, generator=generator)
    ids = torch.randint(0, 128, (TOKENS,), generator=generator)
    return hidden, {"input_ids": ids} if claimed.selection == "hash" else {}


def _persistent_elements(model: nn.Module) -> int:
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return sum(t.numel() for name, t in model.state_dict().items() if name not in parameters)
