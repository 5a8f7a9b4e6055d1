"""EAQuant's smoothing: one scale of the input for all experts of a layer and its router.

EAQuant, arXiv 2506.13329. Shapes: T tokens, D width, F expert width, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from moekit.compress.quantize.awq import centred
from moekit.compress.quantize.block_inputs import BlockInputs
from moekit.compress.quantize.expert_scaling import middle_can_be_scaled
from moekit.compress.quantize.layer_experts import middle_of
from moekit.core.expert_weights import ExpertWeights
from moekit.core.layer import MoELayer

ALPHA = 0.6
OUTLIER_POWER = 0.7
QUANTILE, REACH = 0.65, 1.5


def smooth_scale(activation: Tensor, weight: Tensor, alpha: float = ALPHA) -> Tensor:
    """SmoothQuant's scale [D], by which x is divided: max|x|^alpha / max|W|^(1 - alpha).

    `activation` [D] are the largest absolute inputs, `weight` [R, D] the rows that read them. One
    where either is zero.
    """
    largest = weight.float().abs().amax(0)
    scale = activation.float() ** alpha / largest ** (1 - alpha)
    return torch.where((scale > 0) & scale.isfinite(), scale, 1.0)


def shared_scale(
    peaks: Tensor,
    experts: Iterable[ExpertWeights],
    router: Tensor | None,
    *,
    alpha: float = ALPHA,
) -> Tensor:
    """One scale [D] for all that read the block's input: the largest of each one's own.

    `peaks` [E, D] are the largest inputs of the tokens that chose an expert; an expert without
    tokens has no say. `router` [C, D] has its own, over all of them.
    """
    scales = []
    for peak, expert in zip(peaks, experts, strict=True):
        if bool((peak > 0).any()):
            parts = [part for part in (expert.gate, expert.up) if part is not None]
            scales.append(smooth_scale(peak, torch.cat(parts), alpha))
    if router is not None:
        scales.append(smooth_scale(peaks.amax(0), router, alpha))
    return centred(torch.stack(scales).amax(0)) if scales else torch.ones(peaks.shape[1])


def outlier_scale(peaks: Tensor, power: float = OUTLIER_POWER) -> Tensor:
    """The scale [F] of a down projection: (its peak / the largest normal one)^power at outliers.

    A channel is an outlier if its peak is both beyond the interquartile fence and above Otsu's
    threshold between the two groups; the others keep one.
    """
    peaks = peaks.float()
    high, low = torch.quantile(peaks, QUANTILE), torch.quantile(peaks, 1 - QUANTILE)
    fence = high + REACH * (high - low)
    outliers = (peaks > fence) & (peaks > otsu_threshold(peaks))
    normal = peaks[~outliers]
    if not bool(outliers.any()) or not bool((normal > 0).any()):
        return torch.ones_like(peaks)
    return torch.where(outliers, (peaks / normal.max()) ** power, 1.0)


def otsu_threshold(values: Tensor) -> Tensor:
    """The value [] that splits values [n] into the two groups of the largest variance between."""
    ordered = values.double().sort().values
    count = len(ordered)
    below = torch.arange(1, count, dtype=torch.float64)
    sums = ordered.cumsum(0)
    mean_low = sums[:-1] / below
    mean_high = (sums[-1] - sums[:-1]) / (count - below)
    between = below * (count - below) * (mean_high - mean_low).square()
    return ordered[int(between.argmax())].to(values.dtype)


def input_peaks(inputs: BlockInputs, num_experts: int) -> Tensor:
    """The largest absolute inputs [E, D] of the tokens that chose each expert."""
    peaks = torch.zeros(num_experts, inputs.hidden.shape[1])
    for e in range(num_experts):
        tokens, _ = inputs.of_expert(e)
        if len(tokens):
            peaks[e] = inputs.hidden[tokens].abs().amax(0)
    return peaks


def middle_scales(
    layer: MoELayer, experts: Sequence[ExpertWeights], inputs: BlockInputs
) -> dict[int, Tensor]:
    """Expert -> the scale [F] of its middle, for the experts that have outliers there."""
    made = {}
    if middle_can_be_scaled(layer.experts):
        for e, expert in enumerate(experts):
            tokens, _ = inputs.of_expert(e)
            if len(tokens):
                with torch.no_grad():
                    middle = middle_of(layer, expert, inputs.hidden[tokens])
                scale = outlier_scale(middle.abs().amax(0))
                if bool((scale != 1).any()):
                    made[e] = scale
    return made
