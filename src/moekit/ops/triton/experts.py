"""The experts of one layer on a GPU, and products with a single encoded matrix.

Shapes: T tokens, K chosen, P = T * K pairs, D width, F expert width, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moekit.ops.triton.formats import ExpertFormat, MatrixFormat
from moekit.ops.triton.kernels import UNIT
from moekit.ops.triton.launch import Blocks, Dispatch, combine, project


class GroupedExperts:
    """One layer, by the formats [E] of its experts, whose records lie in `memory` (bytes).

    `blocks` are for measuring: by default the number of tokens decides.
    """

    def __init__(
        self, formats: Sequence[ExpertFormat], memory: Tensor, blocks: Blocks | None = None
    ) -> None:
        self.formats, self.blocks = formats, blocks
        self.memory = memory
        self._members: dict[ExpertFormat, list[int]] = {}
        for expert, made in enumerate(formats):
            self._members.setdefault(made, []).append(expert)

    def start(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> GroupedCall:
        """Begin one call of the layer: hidden [T, D], ids and weights [T, K]."""
        return GroupedCall(self, hidden, ids, weights)

    def places(self, offsets: Mapping[int, int]) -> list[tuple[ExpertFormat, Tensor]]:
        """For each format the places [E] of those of its experts whose records begin at `offsets`
        bytes, multiples of 64, of the memory."""
        found = []
        for made, members in self._members.items():
            own = [e for e in members if e in offsets]
            if own:
                places = [-1] * len(self.formats)
                for expert in own:
                    places[expert] = offsets[expert] // UNIT.value
                found.append((made, torch.tensor(places, device=self.memory.device)))
        return found


class GroupedCall:
    """The outputs [P, D] of one call, in the order of tokens and choices."""

    def __init__(
        self, experts: GroupedExperts, hidden: Tensor, ids: Tensor, weights: Tensor
    ) -> None:
        self._experts = experts
        self._hidden, self._weights = hidden.contiguous(), weights.contiguous()
        self._dispatch = Dispatch(ids.contiguous(), len(experts.formats), experts.blocks)
        self._out = hidden.new_empty(ids.numel(), hidden.shape[1], dtype=torch.float32)
        # One token's products are too few to be worth rounding.
        exact = not self._dispatch.pad
        self._middle_dtype = torch.float32 if exact else hidden.dtype

    def run(self, offsets: Mapping[int, int]) -> None:
        """Compute some of the chosen experts, whose records begin at `offsets`."""
        self.run_placed(self._experts.places(offsets))

    def run_placed(self, placed: Sequence[tuple[ExpertFormat, Tensor]]) -> None:
        """Compute those of the chosen experts that have a place in what `places` gave."""
        top_k = self._weights.shape[1]
        memory, dispatch = self._experts.memory, self._dispatch
        for made, places in placed:
            middle = self._out.new_empty(len(self._out), made.up.rows, dtype=self._middle_dtype)
            project(
                self._hidden,
                middle,
                memory,
                places,
                dispatch,
                top_k,
                made.up,
                gate=made.gate,
                expert=made,
            )
            project(
                middle, self._out, memory, places, dispatch, 1, made.down, expert=made, down=True
            )

    def result(self) -> Tensor:
        """The weighted sum over the choices, [T, D] in the dtype of hidden."""
        out = torch.empty_like(self._hidden)
        combine(self._out, self._weights, self._dispatch, out)
        return out


def matmul(x: Tensor, matrix: MatrixFormat, memory: Tensor) -> Tensor:
    """x [T, cols] times the transposed matrix that lies in `memory` (bytes): [T, rows]."""
    out = x.new_empty(len(x), matrix.rows)
    zeros = torch.zeros(len(x), 1, dtype=torch.int64, device=x.device)
    dispatch = Dispatch(zeros, 1)
    project(x.contiguous(), out, memory, zeros[0], dispatch, 1, matrix)
    return out
