"""Running the experts once, expert by expert, so that statistics see outputs before weighting.

Shapes: T tokens, K choices, n tokens of one expert, D width, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from moekit.core.layer import MoELayer
from moekit.ops.experts_naive import run_down, run_up

# Rows of one expert are run in pieces, so that a large batch does not need large activations.
PIECE_BYTES = 64 << 20
# Low-precision rows come in multiples of the first, above the second in multiples of that.
FEW_ROWS, MANY_ROWS = 32, 512


@dataclass
class ExpertRows:
    """Tokens of one expert: inputs [n, D], outputs [n, D] before weighting.

    `tokens` [n] are rows of the batch and `pairs` [n] positions in the flattened ids [T * K];
    `middle` [n, F] is the input of the down projection, None where a family does not show it.
    """

    expert: int
    tokens: Tensor
    pairs: Tensor
    hidden: Tensor
    middle: Tensor | None
    output: Tensor
    weights: Tensor


def run_routed(
    layer: MoELayer,
    hidden: Tensor,
    ids: Tensor,
    weights: Tensor,
    see: Callable[[ExpertRows], None],
) -> Tensor:
    """Compute the routed output [T, D] of a layer and show `see` every expert's rows on the way.

    Equal to `layer.run_naive` up to the order of sums. Ids of -1, and choices that run no expert,
    add nothing.
    """
    num_choices = layer.num_choices if runs_choices(layer) else layer.num_experts
    flat = ids.reshape(-1)
    flat = flat.where((flat >= 0) & (flat < num_choices), num_choices)
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=num_choices + 1)[:num_choices].tolist()
    # Sums of low-precision outputs are taken in float32 and rounded once.
    total = torch.zeros_like(hidden, dtype=torch.float32)
    flat_weights = weights.reshape(-1)
    step, start = rows_at_once(layer, hidden), 0
    for e, count in enumerate(counts):
        for first in range(start, start + count, step):
            pairs = order[first : min(first + step, start + count)]
            tokens = pairs // ids.shape[1]
            rows = run_rows(layer, e, hidden[tokens], tokens, pairs, flat_weights[pairs])
            total.index_add_(0, tokens, _weighted(layer, rows))
            see(rows)
        start += count
    return total.to(hidden.dtype)


def run_rows(
    layer: MoELayer, e: int, hidden: Tensor, tokens: Tensor, pairs: Tensor, weights: Tensor
) -> ExpertRows:
    """Run one expert on hidden [n, D]."""
    if runs_choices(layer):
        return ExpertRows(e, tokens, pairs, hidden, None, layer.run_expert(e, hidden), weights)
    middle = run_up(layer.experts, e, _padded(hidden))
    output = run_down(layer.experts, e, middle)
    count = len(hidden)
    return ExpertRows(e, tokens, pairs, hidden, middle[:count], output[:count], weights)


def _padded(hidden: Tensor) -> Tensor:
    """Rows of zeros up to a round number, for low precision on the CPU.

    oneDNN builds a kernel for every number of rows it meets and keeps up to 1024 of them, at 0.7 MB
    each: with raw numbers that is more memory than the experts of a layer take.
    """
    if hidden.device.type != "cpu" or hidden.dtype.itemsize > 2:
        return hidden
    step = FEW_ROWS if len(hidden) <= MANY_ROWS else MANY_ROWS
    return functional.pad(hidden, (0, 0, 0, -len(hidden) % step))


def everyone(layer: MoELayer, hidden: Tensor) -> Iterator[ExpertRows]:
    """Run every expert on every token of hidden [T, D], one expert and one piece at a time."""
    step = rows_at_once(layer, hidden)
    for e in range(layer.num_experts):
        for first in range(0, len(hidden), step):
            tokens = torch.arange(first, min(first + step, len(hidden)), device=hidden.device)
            ones = torch.ones(len(tokens), device=hidden.device)
            yield run_rows(layer, e, hidden[first : first + step], tokens, tokens, ones)


def runs_choices(layer: MoELayer) -> bool:
    """Whether the family runs its experts by code of its own, outside of a fused bank."""
    return type(layer).run_expert is not MoELayer.run_expert


def rows_at_once(layer: MoELayer, hidden: Tensor) -> int:
    """Rows whose activations fit into `PIECE_BYTES`."""
    width = hidden.shape[1]
    bank = getattr(layer.experts, "down_proj", None)
    inner = max(bank.shape[1:]) if bank is not None and hasattr(bank, "shape") else 4 * width
    return max(64, PIECE_BYTES // (4 * (3 * width + 3 * inner)))


def _weighted(layer: MoELayer, rows: ExpertRows) -> Tensor:
    weights = rows.weights.unsqueeze(-1)
    if runs_choices(layer):
        # The weight may act inside of the expert (llama4 scales its input), so run it as it is.
        return layer.run_expert(rows.expert, rows.hidden, weights).float()
    return rows.output.float() * weights
