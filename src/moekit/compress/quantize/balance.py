"""Calibration text that reaches every expert often enough.

EAQuant, arXiv 2506.13329: sequences are drawn until each expert has its quota of tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from moekit.core.collect import Batch, collect
from moekit.core.port import SeamCall
from moekit.core.view import MoEView

FACTOR = 2.0


@dataclass
class Drawn:
    """The batches taken, and per layer (position) the experts that are still short of `quota`."""

    batches: list[Batch]
    quota: int
    short: dict[int, list[int]] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return not self.short


def default_quota(top_k: int, num_experts: int, seq_len: int) -> int:
    """EAQuant's quota: twice the tokens of a sequence that an expert would get if all got alike."""
    return int(FACTOR * top_k / num_experts * seq_len)


def draw_balanced(
    view: MoEView, batches: Iterable[Batch], first: int, quota: int | None = None
) -> Drawn:
    """Take the `first` batches, and of the rest those in which an expert below `quota` gets tokens.

    Stops when every expert of every layer has its quota (`default_quota` of the first batch's
    length where it is None), or the text is exhausted.
    """
    counts = [torch.zeros(layer.num_experts, dtype=torch.long) for layer in view]
    kept: list[Batch] = []
    for number, batch in enumerate(batches):
        if quota is None:
            length = batch.ids.shape[1]
            quota = max(default_quota(x.top_k, x.num_experts, length) for x in view)
        if number >= first and not _short(counts, quota):
            break
        sink = _Counts(view)
        collect(view, [batch], [sink])
        needed = any(
            bool(((have < quota) & (new > 0)).any())
            for have, new in zip(counts, sink.counts, strict=True)
        )
        if number < first or needed:
            kept.append(batch)
            counts = [have + new for have, new in zip(counts, sink.counts, strict=True)]
    return Drawn(kept, quota or 0, _short(counts, quota or 0))


class _Counts:
    """A sink: tokens by layer and expert."""

    def __init__(self, view: MoEView) -> None:
        self.counts = [torch.zeros(layer.num_experts, dtype=torch.long) for layer in view]

    def start(self, view: MoEView) -> None: ...

    def batch(self, batch: Batch) -> None: ...

    def layer(self, call: SeamCall) -> None:
        ids = call.ids if call.mask is None else call.ids[call.mask.bool()]
        size = len(self.counts[call.layer.position])
        chosen = ids[(ids >= 0) & (ids < size)].cpu()
        self.counts[call.layer.position] += torch.bincount(chosen, minlength=size)

    def end_batch(self) -> None: ...

    def close(self) -> None: ...


def _short(counts: list[torch.Tensor], quota: int) -> dict[int, list[int]]:
    below = {p: (have < quota).nonzero().flatten().tolist() for p, have in enumerate(counts)}
    return {position: experts for position, experts in below.items() if experts}
