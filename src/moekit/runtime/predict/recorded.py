"""A recorded run that predictors are measured on: routing, token ids and the routers' inputs.

Shapes: N tokens, D width, K chosen, L layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moekit.core.collect import Batch, collect
from moekit.core.errors import UserError
from moekit.core.port import SeamCall
from moekit.core.trace import RoutingTrace
from moekit.core.trace_writer import TraceWriter
from moekit.core.view import MoEView
from moekit.runtime.predict.predictor import chosen_ids, shape_of


@dataclass(frozen=True)
class Recording:
    """Ids [N, K] of every layer, tokens [N], the first token of every sequence, and what the
    routers received, [N, D] of every layer, where it was recorded."""

    ids: list[NDArray[np.int64]]
    tokens: NDArray[np.int64]
    starts: tuple[int, ...]
    num_experts: int
    top_k: int
    hidden: list[NDArray[np.float32]] | None = None

    @classmethod
    def of(cls, trace: RoutingTrace, hidden: list[Tensor] | None = None) -> Recording:
        """The whole trace in memory; `hidden` [N, D] of every layer in the trace's order."""
        num_layers, num_experts, top_k = shape_of([trace])
        return cls(
            [chosen_ids(trace, position, 0, len(trace)) for position in range(num_layers)],
            trace.tokens.numpy(),
            tuple(sample.start for sample in trace.samples if sample.stop > sample.start),
            num_experts,
            top_k,
            None if hidden is None else [h.float().numpy() for h in hidden],
        )

    def __len__(self) -> int:
        return len(self.tokens)

    def passes(self, batch: int = 1) -> Iterator[tuple[bool, NDArray[np.int64]]]:
        """Yield the tokens (row numbers) of one decoding step after another.

        `batch` sequences run together, each giving one token a step until it ends; the flag says
        that new sequences begin.
        """
        bounds = [*self.starts, len(self)]
        for group in range(0, len(self.starts), batch):
            first = np.array(bounds[group : group + batch])
            last = np.array(bounds[group + 1 : group + 1 + batch])
            for step in range(int((last - first).max())):
                yield step == 0, (first + step)[first + step < last]


def record(view: MoEView, batches: Iterable[Batch]) -> Recording:
    """Run the model over batches (padded on the right, if at all) and keep what it did."""
    writer, inputs = TraceWriter(), _RouterInputs()
    collect(view, batches, [writer, inputs])
    if not len(writer.trace):
        raise UserError("there is no text to record: the data has no tokens")
    hidden = [torch.cat(parts) for parts in inputs.parts]
    if any(len(rows) != len(writer.trace) for rows in hidden):
        raise UserError("not every layer sees every token here: routers' inputs cannot be recorded")
    return Recording.of(writer.trace, hidden)


class _RouterInputs:
    """A sink that keeps what every router received, without padding."""

    def start(self, view: MoEView) -> None:
        self.parts: list[list[Tensor]] = [[] for _ in view]

    def batch(self, batch: Batch) -> None: ...

    def layer(self, call: SeamCall) -> None:
        given = call.hidden if call.router_input is None else call.router_input
        rows = given.detach().reshape(-1, given.shape[-1])
        kept = rows if call.mask is None else rows[call.mask]
        self.parts[call.layer.position].append(kept.float().cpu().clone())

    def end_batch(self) -> None: ...

    def close(self) -> None: ...
