"""How far apart two experts of a layer are: the features that every grouping can go by.

Shapes: E experts, D width, F expert width. Distances [E, E] in float64, 0 on the diagonal.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moekit.compress.condense.context import LayerContext
from moekit.core.errors import UserError
from moekit.core.neurons import neuron_rows
from moekit.ops.align import match_weights

Array = NDArray[np.float64]
# Not by products, whose rounding sets equal experts apart.
EXACT = "donot_use_mm_for_euclid_dist"


def router_logits(context: LayerContext) -> Array:
    """1 - (1 + cosine) / 2 of the router logits of two experts over all tokens (M-SMoE)."""
    return _from_gram(context.statistic("logit_gram", 2))


def mean_output(context: LayerContext) -> Array:
    """Euclidean distance of the mean outputs over all tokens, routed or not (HC-SMoE)."""
    return _euclidean(mean_outputs(context))


def output(context: LayerContext) -> Array:
    """Root mean square over all tokens of the distance of two experts' outputs."""
    gram = context.statistic("output_gram", 2).double()
    tokens = max(int(context.stats.get(context.position, "output_tokens")), 1)
    squares = gram.diagonal()
    apart = (squares[:, None] + squares[None] - 2 * gram).clamp_min(0) / tokens
    return _clean(apart.sqrt())


def output_cosine(context: LayerContext) -> Array:
    """1 - (1 + cosine) / 2 of two experts' outputs over all tokens together."""
    return _from_gram(context.statistic("output_gram", 2))


def weights(context: LayerContext) -> Array:
    """Euclidean distance of the weights, all experts' neurons in the order of expert 0's."""
    first = neuron_rows(context.read(0))
    rows = [first]
    for expert in range(1, context.num_experts):
        other = neuron_rows(context.read(expert))
        rows.append(other[match_weights(first, other)])
    return _euclidean(torch.stack([row.flatten() for row in rows]))


# feature: the distance, and the set of `moekit profile` that it needs beyond the default one
FEATURES: dict[str, tuple[Callable[[LayerContext], Array], str | None]] = {
    "router-logits": (router_logits, None),
    "mean-output": (mean_output, "outputs"),
    "output": (output, "outputs"),
    "output-cosine": (output_cosine, "outputs"),
    "weights": (weights, None),
}


def distances(context: LayerContext, feature: str) -> Array:
    """The distances [E, E] by one of `FEATURES`; UserError for another name or missing stats."""
    return FEATURES[check_feature(feature)][0](context)


def check_feature(feature: str) -> str:
    if feature not in FEATURES:
        raise UserError(f"no feature is called {feature!r}; there are {', '.join(FEATURES)}.")
    return feature


def mean_outputs(context: LayerContext) -> Tensor:
    """Mean output of every expert over all tokens [E, D]."""
    total = context.statistic("output_sum", 1).double()
    return total / max(int(context.stats.get(context.position, "output_tokens")), 1)


def _from_gram(gram: Tensor) -> Array:
    norms = gram.double().diagonal().clamp_min(0).sqrt().clamp_min(1e-12)
    return _clean((1 - gram.double() / norms[:, None] / norms[None]).clamp(0, 2) / 2)


def _euclidean(rows: Tensor) -> Array:
    return _clean(torch.cdist(rows.double(), rows.double(), compute_mode=EXACT))


def _clean(distance: Tensor) -> Array:
    found = ((distance + distance.T) / 2).numpy(force=True).astype(np.float64)
    np.fill_diagonal(found, 0.0)
    return found
