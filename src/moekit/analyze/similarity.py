"""Similarity of the experts of one layer, by their weights and by what they compute.

Shapes: E experts, F expert width, D width, T tokens, P parts times width, S sketch.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moekit.core.layer import MoELayer
from moekit.core.seeds import generator

Array = NDArray[np.float64]


def neurons(layer: MoELayer, expert: int) -> Tensor:
    """The neurons of an expert, [F, P]: each its gate row, up row and down column side by side.

    Every matrix is scaled to mean square 1, so that none of them decides alone.
    """
    weights = layer.expert_views(expert)
    parts = [part for part in (weights.gate, weights.up, weights.down.T) if part is not None]
    scaled = [part.float() / part.float().square().mean().sqrt().clamp_min(1e-12) for part in parts]
    return torch.cat(scaled, dim=1)


def weight_similarity(layer: MoELayer, sketch: int, seed: int) -> Array:
    """Cosine [E, E] of the Gram matrices of the experts' neurons, without their mean diagonal.

    The order of the neurons does not matter: 1 for two experts with the same neurons, 0 on average
    for independent random ones. With fewer than P columns the Gram matrices are compared on
    `sketch` random directions, the same for all experts.
    """
    width = neurons(layer, 0).shape[1]
    directions = _directions(width, min(sketch, width), seed, layer.index)
    sketches = []
    for expert in range(layer.num_experts):
        rows = neurons(layer, expert)
        directions = directions.to(rows.device)
        product = rows.T @ (rows @ directions)
        # Without this part any two experts with many neurons would look alike.
        product -= rows.square().sum() / width * directions
        sketches.append(product.flatten())
    return _cosine(torch.stack(sketches))


def expert_outputs(layer: MoELayer, hidden: Tensor) -> Tensor:
    """Every expert on every token of hidden [T, D], unweighted: [E, T, D] in float32."""
    return torch.stack(
        [layer.run_expert(e, hidden).detach().float() for e in range(layer.num_experts)]
    )


def output_cosine(outputs: Tensor) -> Array:
    """Cosine [E, E] of the outputs [E, T, D] on all tokens together."""
    return _cosine(outputs.flatten(1))


def output_cka(outputs: Tensor) -> Array:
    """Linear CKA [E, E] of the outputs [E, T, D] over tokens, without its bias for few tokens.

    Unlike the cosine it is 1 for outputs that differ by a rotation. Not a number below 4 tokens.
    """
    experts, tokens, _ = outputs.shape
    if tokens < 4:
        return np.full((experts, experts), np.nan)
    centred = outputs.double()
    gram = centred @ centred.transpose(1, 2)
    gram.diagonal(dim1=1, dim2=2).zero_()
    sums = gram.sum(2)
    total = sums.sum(1)
    flat = gram.flatten(1)
    # The unbiased estimator of HSIC (Song et al. 2012), for all pairs of experts at once.
    hsic = (
        flat @ flat.T
        + torch.outer(total, total) / ((tokens - 1) * (tokens - 2))
        - 2 * (sums @ sums.T) / (tokens - 2)
    ).numpy(force=True)
    scale = np.sqrt(np.maximum(np.outer(hsic.diagonal(), hsic.diagonal()), 1e-24))
    return hsic / scale


def _directions(width: int, count: int, seed: int, layer: int) -> Tensor:
    """Orthonormal directions [width, count]: all of them where none is left out."""
    if count == width:
        return torch.eye(width)
    source = generator(seed, "weight-similarity", layer)
    return torch.linalg.qr(torch.randn(width, count, generator=source)).Q


def _cosine(rows: Tensor) -> Array:
    unit = rows.double() / rows.double().norm(dim=1, keepdim=True).clamp_min(1e-12)
    return (unit @ unit.T).clamp(-1, 1).numpy(force=True)
