"""What the router did: ids and weights per layer and token, readable without the model.

On disk a trace is a directory: `trace.json` (header, with a format version) and safetensors chunks.
Chunk tensors are `tokens` [n] int32 (-1: unknown), `phase` [n] uint8 and per layer position i
`ids.i` [n, K_i] signed, `weights.i` [n, K_i] in the dtype the experts received, and `logits.i`
[n, C_i] where asked for. Tokens of one sample are contiguous and in order; padding is left out.
Layers may differ in E and K. An id of -1 has weight 0: a token that uses fewer experts there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moekit.core.errors import UserError
from moekit.core.trace_files import (
    Chunk,
    TraceHeader,
    TraceLayer,
    new_directory,
    open_chunks,
    write_chunk,
    write_header,
)

PREFILL, DECODE = 0, 1


@dataclass(frozen=True)
class Sample:
    """A contiguous range of tokens [start, stop) from one text."""

    start: int
    stop: int
    domain: str


@dataclass(frozen=True)
class LayerRouting:
    """One layer: topk_ids [N, K] int64, topk_weights [N, K], and logits [N, C] or None."""

    topk_ids: Tensor
    topk_weights: Tensor
    logits: Tensor | None


class RoutingTrace:
    """The routing of N tokens. Open one with `RoutingTrace.open`, make one with `MoEView.trace`.

    A trace on disk is read as it is asked for: iterate over `spans` and give their bounds to
    `layer` to stay within bounded memory.
    """

    def __init__(self, header: TraceHeader | None = None, chunks: list[Chunk] | None = None):
        self.header = header or TraceHeader()
        self.chunks = chunks or []

    @classmethod
    def open(cls, path: str | Path) -> RoutingTrace:
        """Open a trace directory; raises UserError when it is none, is incomplete or is damaged."""
        return cls(*open_chunks(Path(path)))

    def save(self, path: str | Path) -> None:
        """Write the trace to a new directory, chunk by chunk."""
        with new_directory(Path(path)) as directory:
            sizes = []
            for number, chunk in enumerate(self.chunks):
                tensors = {
                    name: chunk.read(name, 0, chunk.num_tokens) for name in self.header.widths()
                }
                write_chunk(directory, number, tensors)
                sizes.append(chunk.num_tokens)
            write_header(directory, self.header, sizes)

    def __len__(self) -> int:
        return sum(chunk.num_tokens for chunk in self.chunks)

    @property
    def layers(self) -> list[TraceLayer]:
        return self.header.layers

    @property
    def domains(self) -> list[str]:
        """The domain labels that occur, in order of first occurrence."""
        return self.header.domains

    @property
    def samples(self) -> list[Sample]:
        """The samples in order; one that was all padding is empty."""
        samples, start = [], 0
        for length, domain in zip(self.header.lengths, self.header.sample_domains, strict=True):
            samples.append(Sample(start, start + length, self.header.domains[domain]))
            start += length
        return samples

    @property
    def sample_of(self) -> Tensor:
        """The sample number of every token [N]."""
        lengths = torch.tensor(self.header.lengths, dtype=torch.long)
        return torch.arange(len(lengths)).repeat_interleave(lengths)

    @property
    def tokens(self) -> Tensor:
        """The token id at every position [N], -1 where it was not known."""
        return self._read("tokens", 0, len(self)).long()

    @property
    def phase(self) -> Tensor:
        """PREFILL or DECODE for every token [N]."""
        return self._read("phase", 0, len(self))

    def layer(self, position: int, start: int = 0, stop: int | None = None) -> LayerRouting:
        """Return the routing of the layer at `position` for the tokens [start, stop)."""
        if not self.chunks:
            raise UserError("the trace is empty; it is filled when its context ends.")
        if not 0 <= position < len(self.layers):
            raise UserError(f"the trace has layers 0 to {len(self.layers) - 1}, not {position}.")
        stop = len(self) if stop is None else stop
        if not 0 <= start <= stop <= len(self):
            raise UserError(f"the trace has tokens 0 to {len(self)}, not {start} to {stop}.")
        return LayerRouting(
            self._read(f"ids.{position}", start, stop).long(),
            self._read(f"weights.{position}", start, stop),
            self._read(f"logits.{position}", start, stop) if self.header.logits else None,
        )

    def spans(self) -> Iterator[tuple[int, int]]:
        """Yield the bounds [start, stop) of the stored chunks, each small enough for memory."""
        start = 0
        for chunk in self.chunks:
            yield start, start + chunk.num_tokens
            start += chunk.num_tokens

    def _read(self, name: str, start: int, stop: int) -> Tensor:
        parts = [
            chunk.read(name, max(start - first, 0), min(stop, last) - first)
            for chunk, (first, last) in zip(self.chunks, self.spans(), strict=True)
            if first < stop and start < last
        ]
        return torch.cat(parts or [self.chunks[0].read(name, 0, 0)])
