"""Experts for segments of tokens, beside a shared one that mixes their positions (Seg-MoE).

Seg-MoE, arXiv 2601.21641. For the routers "segment" and "chunk" with the same size.

Shapes: T tokens, U segments of up to W tokens, D width, F expert width, E experts, N pairs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moekit.core.errors import UserError
from moekit.core.registry import register

from ..compute import grouped_linear, run_sorted
from ..routing import Pairs, Routing


class Segments(NamedTuple):
    """Tokens by segment: `folded` [U, W, D], zero where there is none; `unit` and `place` [T]."""

    folded: Tensor
    unit: Tensor
    place: Tensor


def fold_segments(hidden: Tensor, routing: Routing, size: int) -> Segments:
    """Bring `hidden` [T, D] into segments of `size`; padding becomes zero.

    Without units in the routing each token is a segment. Raises UserError for a longer segment.
    """
    unit = routing.unit_of_token
    index = torch.arange(len(hidden), device=hidden.device)
    if unit is None:
        unit = index
    counts = torch.bincount(unit)
    if len(counts) and int(counts.max()) > size:
        raise UserError(
            f"the router's segments have up to {int(counts.max())} tokens, the experts' {size}; "
            "give both the same size"
        )
    # Units are numbered in the order of their tokens.
    place = index - (counts.cumsum(0) - counts)[unit]
    rows = hidden
    if routing.token_mask is not None:
        rows = hidden.masked_fill(~routing.token_mask[:, None], 0.0)
    folded = hidden.new_zeros(len(counts), size, hidden.shape[1])
    return Segments(folded.index_put((unit, place), rows), unit, place)


@register(
    "expert",
    "segment",
    title="Experts that read a whole segment, or token by token beside a shared one that does",
    paper="Seg-MoE, arXiv:2601.21641",
    needs=("training",),
    limits="The only bank of its pool. Mixes the tokens of a segment, so it is not causal.",
    options={
        "expert_width": "width F between the two products, for each token of a segment",
        "size": "tokens a segment, as in the router",
        "whole": "routed experts read the whole segment; off as released: token by token",
        "shared": "a shared expert on the whole segment, with a gate",
    },
)
class SegmentExperts(nn.Module):
    """down(gelu(up u)) with u a token or, if `whole`, a segment of W tokens side by side.

    `up` [E, F, D] and `down` [E, D, F], W times as wide and as high if `whole`. A `shared` expert
    maps segments, [W * D] to [W * F] to [W * D], times sigmoid(gate u).
    """

    causal = False

    def __init__(
        self,
        width: int,
        count: int,
        *,
        expert_width: int,
        size: int,
        whole: bool = False,
        shared: bool = True,
    ) -> None:
        super().__init__()
        if size < 1:
            raise UserError(f"size {size} of a segment is below 1")
        self.num_experts, self.size, self.whole = count, size, whole
        factor = size if whole else 1
        self.cost = 2 * width * expert_width * factor
        self.up = nn.Parameter(torch.empty(count, expert_width * factor, width * factor))
        self.down = nn.Parameter(torch.empty(count, width * factor, expert_width * factor))
        if shared:
            self.shared_up = nn.Parameter(torch.empty(expert_width * size, width * size))
            self.shared_down = nn.Parameter(torch.empty(width * size, expert_width * size))
            self.gate = nn.Parameter(torch.empty(1, width * size))
        self.init_weights_with(0.02)

    def init_weights_with(self, std: float) -> None:
        for weight in self.parameters():
            nn.init.normal_(weight, std=std)

    def run_routing(self, hidden: Tensor, routing: Routing) -> Tensor:
        """`hidden` [T, D] by segment: the routed experts, and the shared one if there is one."""
        segments = fold_segments(hidden, routing, self.size)
        out = self._routed(hidden, routing, segments)
        if hasattr(self, "shared_up"):
            flat = segments.folded.flatten(1)
            own = F.linear(F.gelu(F.linear(flat, self.shared_up)), self.shared_down)
            out = out + self._unfold(F.sigmoid(F.linear(flat, self.gate)) * own, segments)
        return out

    def forward(self, hidden: Tensor, pairs: Pairs) -> Tensor:
        """Sum over pairs of weight * expert(hidden[token]), each token a segment: [T, D]."""
        routing = Routing(*pairs, num_tokens=len(hidden), num_experts=self.num_experts)
        return self._routed(hidden, routing, fold_segments(hidden, routing, self.size))

    def _routed(self, hidden: Tensor, routing: Routing, segments: Segments) -> Tensor:
        if not self.whole:
            return run_sorted(hidden, routing.pairs, self.num_experts, self._rows)
        pairs = self._of_units(routing, segments)
        out = run_sorted(segments.folded.flatten(1), pairs, self.num_experts, self._rows)
        return self._unfold(out, segments)

    def _of_units(self, routing: Routing, segments: Segments) -> Pairs:
        """The pairs of each segment's first token, as pairs of the segment."""
        first = segments.place[routing.token] == 0
        unit = segments.unit[routing.token[first]]
        return Pairs(unit, routing.expert[first], routing.weight[first])

    def _unfold(self, flat: Tensor, segments: Segments) -> Tensor:
        rows = flat.unflatten(1, (self.size, -1))
        return rows[segments.unit, segments.place]

    def _rows(self, rows: Tensor, ends: Tensor) -> Tensor:
        return grouped_linear(F.gelu(grouped_linear(rows, self.up, ends)), self.down, ends)

    def run_one(self, expert: int, rows: Tensor) -> Tensor:
        """Routed expert `expert` on `rows` [n, D], each at the start of a segment of its own."""
        inputs = F.pad(rows, (0, self.up.shape[2] - rows.shape[1]))
        out = F.linear(F.gelu(F.linear(inputs, self.up[expert])), self.down[expert])
        return out[:, : rows.shape[1]]
