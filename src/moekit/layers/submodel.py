"""Cutting a sub-model out of an elastic model: fewer layers, experts and experts a token."""

from __future__ import annotations

import copy
from typing import Any

import torch

from moekit.core.errors import UserError

from .config import MoekitConfig
from .elastic_depth import spaced_layers
from .model import MoekitForCausalLM


@torch.no_grad()
def cut_submodel(
    model: MoekitForCausalLM,
    *,
    experts: int | None = None,
    top_k: int | None = None,
    depth: int | None = None,
) -> MoekitForCausalLM:
    """The sub-model of the first `experts` experts of `depth` layers, `top_k` experts a token.

    What `model` computes with `eval_experts`, `eval_top_k` and `elastic_depth.eval` set so, as a
    model of its own with copied weights (ElasticMoE of ERNIE 5.0, arXiv 2602.04705). What is left
    out stays whole. Raises UserError for a model whose layers differ, whose pools have several
    banks or are shared, or whose router is not "elastic".
    """
    config = _sub_config(model.config, experts, top_k, depth)
    kept = spaced_layers(config.num_hidden_layers, model.config.num_hidden_layers)
    part: Any = MoekitForCausalLM(config)
    part.to(dtype=model.dtype)
    whole = model.state_dict()
    for name, value in part.state_dict().items():
        source = whole[_name_in_whole(name, kept)]
        # Experts are the first dimension of whatever has one row or matrix for each of them.
        value.copy_(source[: len(value)] if source.dim() else source)
    return part.train(model.training)


def _sub_config(
    config: MoekitConfig, experts: int | None, top_k: int | None, depth: int | None
) -> MoekitConfig:
    moe = copy.deepcopy(config.moe) or {"router": "dense"}
    router = moe["router"]
    router = {"name": router} if isinstance(router, str) else router
    if router["name"] != "elastic":
        raise UserError(f"router {router['name']!r} has no sub-models; train with 'elastic'")
    if moe.get("overrides") or moe.get("share_pool", 1) > 1 or isinstance(moe["experts"], list):
        raise UserError("sub-models are cut out of equal layers with one bank of their own each")
    moe["experts"]["count"] = experts or moe["experts"]["count"]
    moe["top_k"] = top_k or moe["top_k"]
    # Drawn no further: what was cut out is the full model of its kind.
    plain = {key: router[key] for key in ("weights", "bias_rate") if key in router}
    moe["router"] = {"name": "elastic", "full": 1.0, **plain}
    layers = spaced_layers(depth or config.num_hidden_layers, config.num_hidden_layers)
    recipes = config.layer_recipes()
    moe["layers"] = [new for new, old in enumerate(layers) if recipes[old] is not None]
    values = config.to_dict()
    values |= {"moe": moe, "num_hidden_layers": len(layers), "elastic_depth": None}
    if values.get("layer_types"):
        values["layer_types"] = [values["layer_types"][old] for old in layers]
    return MoekitConfig(**values)


def _name_in_whole(name: str, kept: list[int]) -> str:
    prefix = "model.layers."
    if not name.startswith(prefix):
        return name
    number, _, rest = name.removeprefix(prefix).partition(".")
    return f"{prefix}{kept[int(number)]}.{rest}"
