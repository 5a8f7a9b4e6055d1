"""The spec of every family agrees with its built model: parameters, shapes and routing rule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moekit.core.family_table import RULES
from moekit.core.layer import MoELayer
from moekit.core.layer_spec import LayerSpec
from moekit.core.spec import spec_from_config
from moekit.core.view import MoEView
from tests.families.routing_oracle import claimed_weights
from tests.families.scan import UNDECORATED, decorated_families
from tests.families.tiny import SKIP, TINY, build_tiny

TOKENS = 64


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
            expected = _claim(claimed, layer, hidden, routing.logits, context)
        weights = torch.zeros(TOKENS, layer.num_choices + 1)
        # Unused choices have id -1 and land in the column that is cut off.
        weights.scatter_add_(-1, routing.ids % (layer.num_choices + 1), routing.weights.float())
        experts = slice(0, claimed.num_experts)
        # float32 sums of a few terms in another order
        torch.testing.assert_close(
            weights[:, experts], expected[:, experts].float(), rtol=1e-5, atol=1e-6
        )
        assert len({int(i) for i in routing.ids.flatten()}) > claimed.top_k, "degenerate routing"


def _router_inputs(claimed: LayerSpec, layer: MoELayer) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(claimed.layer_index)
    hidden = torch.randn(1, TOKENS, layer.router_width, generator=generator)
    ids = torch.randint(0, 128, (1, TOKENS), generator=generator)
    return hidden, {"input_ids": ids} if claimed.selection == "hash" else {}


def _claim(
    claimed: LayerSpec,
    layer: MoELayer,
    hidden: Tensor,
    logits: Tensor,
    context: dict[str, Tensor],
) -> Tensor:
    router = layer.router
    extra: dict[str, Any] = {"bias": layer.correction_bias}
    if claimed.selection == "hash":
        extra["hash_ids"] = router.tid2eid[context["input_ids"].flatten()]
    if claimed.normalizes_with_shared:
        shared = layer.router_weight[claimed.num_experts :]
        extra["shared_logits"] = hidden.flatten(0, 1) @ shared.T
    if claimed.has_expert_scale:
        extra["expert_scale"] = router.per_expert_scale
    if claimed.score == "sparsemixer":
        extra["jitter"] = router.router_jitter_noise
    return claimed_weights(claimed, logits.float(), **extra)


def _persistent_elements(model: nn.Module) -> int:
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return sum(t.numel() for name, t in model.state_dict().items() if name not in parameters)
