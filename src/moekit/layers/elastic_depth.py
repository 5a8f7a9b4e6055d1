"""Sub-models of fewer layers, drawn while training (ElasticMoE of ERNIE 5.0, arXiv:2602.04705)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moekit.core.errors import UserError

from .context import RouterContext
from .routers.elastic import sub_model_draw

_KEYS = ("depths", "full", "eval")


def check_depth(elastic: Mapping[str, Any] | None, num_layers: int) -> None:
    """UserError unless `elastic` holds numbers of layers that a model of `num_layers` has."""
    if elastic is None:
        return
    unknown = set(elastic) - set(_KEYS)
    depths = elastic.get("depths")
    if unknown or not isinstance(depths, list) or not depths:
        raise UserError("elastic_depth is not written as {depths: [4, 8], full: 0.5, eval: 8}")
    for depth in (*depths, elastic.get("eval", num_layers)):
        if not isinstance(depth, int) or not 1 <= depth <= num_layers:
            raise UserError(f"elastic_depth: {depth!r} is not between 1 and {num_layers} layers")


def kept_layers(
    elastic: Mapping[str, Any] | None, context: RouterContext, num_layers: int
) -> list[int]:
    """The layers that run in this step; the others pass the residual stream on as it is.

    In a step of training the full model runs with probability `elastic["full"]` (one half by
    default), in the same steps as that of router "elastic"; otherwise one of `elastic["depths"]`
    layers does, evenly spaced and the first among them. Outside of training `elastic["eval"]` do.
    """
    if elastic is None:
        return list(range(num_layers))
    depth = elastic.get("eval", num_layers)
    if context.training:
        is_full, *_, pick = sub_model_draw(context)
        depths = elastic["depths"]
        full = is_full < elastic.get("full", 0.5)
        depth = num_layers if full else depths[int(pick * len(depths))]
    return spaced_layers(depth, num_layers)


def spaced_layers(depth: int, num_layers: int) -> list[int]:
    """`depth` of `num_layers` layers, evenly spaced, the first and (if two or more) the last."""
    if depth == 1:
        return [0]
    return [round(i * (num_layers - 1) / (depth - 1)) for i in range(depth)]
