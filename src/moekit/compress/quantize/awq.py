"""AWQ: scale the channels that matter before rounding, by a search over one exponent.

AWQ, arXiv 2306.00978. All experts of a layer read one norm, so they share the scale of their input;
each expert has its own for the middle, between up and down. What is compared is the output of the
whole block. Shapes: T tokens, D width, F expert width, E experts, G columns a group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moekit.compress.quantize.block_inputs import BlockInputs
from moekit.compress.quantize.expert_scaling import ChannelScales, middle_can_be_scaled
from moekit.compress.quantize.layer_experts import middle_of, output_of
from moekit.core.expert_weights import ExpertWeights
from moekit.core.layer import MoELayer
from moekit.ops.codecs import Codec
from moekit.ops.codecs.range_search import rounded

GRID = tuple(step / 20 for step in range(20))


@dataclass(frozen=True)
class AwqScales:
    """The scales of one layer: `inputs` [D], `middle` by expert [F], and how far they helped.

    `errors` are the mean squared errors of the block's output before and after.
    """

    inputs: Tensor | None
    middle: dict[int, Tensor]
    errors: tuple[float, float]


def awq_scale(activation: Tensor, weight: Tensor, ratio: float, group_size: int) -> Tensor:
    """The scale [D] of exponent `ratio`, from mean |x| [D] and the rows [R, D] that read x.

    s = mean|x|^r / (mean of |W| over its group's largest)^(1 - r), centred around one.
    """
    grouped = weight.float().abs().unflatten(1, (-1, group_size))
    largest = grouped.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    mean = (grouped / largest).flatten(1).mean(0)
    scale = activation.float() ** ratio / (mean ** (1 - ratio) + 1e-4)
    return centred(scale)


def centred(scale: Tensor) -> Tensor:
    """A scale [D] divided by the geometric mean of its ends; ones where it is not positive."""
    scale = torch.where((scale > 0) & scale.isfinite(), scale, 1.0)
    return scale / (scale.max() * scale.min()).sqrt()


def search_awq(
    layer: MoELayer,
    codecs: Sequence[Codec],
    inputs: BlockInputs,
    *,
    grid: Sequence[float] = GRID,
) -> AwqScales:
    """Search the scales of one layer; `codecs` [E] are what its experts will be rounded by.

    Ones (no change) are always a candidate. Raises `UserError` for a family that runs its experts
    by code of its own.
    """
    experts = [layer.get_expert(e) for e in range(layer.num_experts)]
    expected = _outputs(layer, experts, inputs)
    plain = [round_expert(x, codec) for x, codec in zip(experts, codecs, strict=True)]
    before = _distance(_outputs(layer, plain, inputs), expected)
    least, found = _error(layer, experts, codecs, None, inputs, expected), None
    activation = inputs.hidden.abs().mean(0)
    rows = torch.cat([_readers(expert) for expert in experts])
    group_size = max(_group_size(codec, rows) for codec in codecs)
    for ratio in grid:
        scale = awq_scale(activation, rows, ratio, group_size)
        error = _error(layer, experts, codecs, scale, inputs, expected)
        if error < least:
            least, found = error, scale
    middle = {}
    if middle_can_be_scaled(layer.experts):
        for e, expert in enumerate(experts):
            best = _search_middle(layer, expert, codecs[e], inputs.of_expert(e), inputs, grid)
            if best is not None:
                middle[e] = best
    made = [
        round_expert(ChannelScales(found, middle.get(e)).apply(expert), codecs[e])
        for e, expert in enumerate(experts)
    ]
    seen = inputs.hidden if found is None else inputs.hidden / found
    after = _distance(_outputs(layer, made, inputs, seen), expected)
    return AwqScales(found, middle, (before, after))


def round_expert(expert: ExpertWeights, codec: Codec, reach: float = 0.0) -> ExpertWeights:
    """The expert with its matrices rounded to nearest by `codec`, float32.

    `reach` is the share by which ranges may shrink.
    """
    parts = {}
    for name, part in expert.tensors().items():
        matrix = part.dim() == 2
        parts[name] = rounded(codec, part, reach) if matrix else part.float()
    return dataclasses.replace(expert, **parts)


def _group_size(codec: Codec, weight: Tensor) -> int:
    """Columns that share a scale; a whole row where a codec has no groups."""
    return getattr(codec, "group_size", 0) or weight.shape[1]


def _readers(expert: ExpertWeights) -> Tensor:
    """The rows [R, D] that read an expert's input."""
    assert expert.up is not None
    return expert.up if expert.gate is None else torch.cat([expert.gate, expert.up])


def _outputs(
    layer: MoELayer,
    experts: Sequence[ExpertWeights],
    inputs: BlockInputs,
    hidden: Tensor | None = None,
) -> Tensor:
    """The block's routed output [T, D] with given experts."""
    hidden = inputs.hidden if hidden is None else hidden
    total = torch.zeros_like(inputs.hidden)
    with torch.no_grad():
        for e, expert in enumerate(experts):
            tokens, gates = inputs.of_expert(e)
            if len(tokens):
                made = output_of(layer, expert, middle_of(layer, expert, hidden[tokens]))
                total.index_add_(0, tokens, made * gates[:, None])
    return total


def _error(
    layer: MoELayer,
    experts: Sequence[ExpertWeights],
    codecs: Sequence[Codec],
    scale: Tensor | None,
    inputs: BlockInputs,
    expected: Tensor,
) -> float:
    """The error when gate and up alone are rounded: down has a scale of its own."""
    made = [
        dataclasses.replace(
            round_expert(ChannelScales(scale).apply(expert), codec), down=expert.down
        )
        for expert, codec in zip(experts, codecs, strict=True)
    ]
    hidden = inputs.hidden if scale is None else inputs.hidden / scale
    return _distance(_outputs(layer, made, inputs, hidden), expected)


def _search_middle(
    layer: MoELayer,
    expert: ExpertWeights,
    codec: Codec,
    chosen: tuple[Tensor, Tensor],
    inputs: BlockInputs,
    grid: Sequence[float],
) -> Tensor | None:
    """The scale [F] of an expert's middle that leaves its part of the block's output best."""
    tokens, gates = chosen
    if not len(tokens):
        return None
    group_size = _group_size(codec, expert.down)
    with torch.no_grad():
        middle = middle_of(layer, expert, inputs.hidden[tokens])
        expected = output_of(layer, expert, middle) * gates[:, None]
        activation = middle.abs().mean(0)
        best, found = None, None
        for ratio in (None, *grid):
            scale = (
                torch.ones_like(activation)
                if ratio is None
                else awq_scale(activation, expert.down, ratio, group_size)
            )
            down = rounded(codec, expert.down.float() * scale) / scale
            candidate = dataclasses.replace(expert, down=down)
            made = output_of(layer, candidate, middle)
            error = _distance(made * gates[:, None], expected)
            if best is None or error < best:
                best, found = error, None if ratio is None else scale
    return found


def _distance(made: Tensor, expected: Tensor) -> float:
    return float((made - expected).square().mean())
