"""A sample of what the experts of a layer get, for searches that run them again.

Shapes: T tokens, D width, K choices, n tokens of one expert.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moekit.core.stats import ExpertStats


@dataclass(frozen=True)
class BlockInputs:
    """Tokens of one layer: hidden [T, D] and weights [T, K] in float32, ids [T, K]."""

    hidden: Tensor
    ids: Tensor
    weights: Tensor

    @classmethod
    def of(cls, stats: ExpertStats, position: int, limit: int | None = None) -> BlockInputs:
        """The sample of the MoE layer at `position`, of it `limit` tokens spread evenly.

        Raises `UserError` if the stats have none.
        """
        names = ("sample_hidden", "sample_ids", "sample_weights")
        held = [stats.get(position, name) for name in names]
        step = 1 if limit is None else -(-len(held[0]) // limit)
        hidden, ids, weights = (value[::step] for value in held)
        return cls(hidden.float(), ids, weights.float())

    def of_expert(self, expert: int) -> tuple[Tensor, Tensor]:
        """The rows [n] of `hidden` that chose an expert, and their gate weights [n]."""
        tokens, choices = (self.ids == expert).nonzero(as_tuple=True)
        return tokens, self.weights[tokens, choices]
