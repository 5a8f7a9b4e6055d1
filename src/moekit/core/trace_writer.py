"""A sink that turns calls at the seam into a `RoutingTrace`, in memory or on disk.

The calls of a batch come layer by layer and step by step; a trace holds sample after sample. So the
writer keeps the calls of one batch (in a pass) or one prompt with its decode steps (elsewhere),
puts their tokens in order, and writes whenever enough has come together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moekit.core.collect import Batch
from moekit.core.errors import UserError
from moekit.core.port import SeamCall
from moekit.core.seam import observe
from moekit.core.trace import DECODE, PREFILL, RoutingTrace
from moekit.core.trace_files import (
    Chunk,
    FileChunk,
    MemoryChunk,
    TraceHeader,
    TraceLayer,
    begin_directory,
    finish_directory,
    write_chunk,
    write_header,
)

if TYPE_CHECKING:
    from moekit.core.view import MoEView

CHUNK_BYTES = 64 << 20


@dataclass
class _Forward:
    """The calls of one forward over tokens [B, S], flattened; `layers` by position."""

    batch_shape: tuple[int, int]
    phase: int
    mask: Tensor
    tokens: Tensor
    layers: dict[int, dict[str, Tensor]] = field(default_factory=dict)


class TraceWriter:
    """A sink that writes a trace to the directory `out`, or keeps it in memory without one.

    `trace` is filled by `close`. Padding is left out. A layer that a token did not pass (the other
    stack of an encoder-decoder, experts of another modality) has ids of -1 and weights of 0 there.
    With `logits` the pass must be made with logits too. Raises UserError when `out` exists or
    cannot be written. A failed trace leaves only `OUT.partial`, which the next attempt replaces.
    """

    def __init__(
        self,
        out: str | Path | None = None,
        *,
        logits: bool = False,
        domain: str = "",
        metadata: dict[str, Any] | None = None,
        chunk_bytes: int = CHUNK_BYTES,
    ):
        self.trace = RoutingTrace()
        self._out = Path(out) if out is not None else None
        self._header = TraceHeader(logits=logits, metadata=metadata or {})
        self._domain = domain
        self._chunk_bytes = chunk_bytes

    # -- the sink --

    def start(self, view: MoEView) -> None:
        config = getattr(view.model, "config", None)
        self._header.model_type = getattr(config, "model_type", "")
        self._header.layers = [
            TraceLayer(m.index, m.name, m.num_experts, m.num_choices, m.top_k) for m in view
        ]
        self._directory = begin_directory(self._out) if self._out is not None else None
        self._forwards: dict[int, _Forward] = {}
        self._pending: list[dict[str, Tensor]] = []
        self._chunks: list[Chunk] = []
        self._labels: Sequence[str] | None = None
        self._in_batch = False

    def batch(self, batch: Batch) -> None:
        self._labels = batch.domains
        self._in_batch = True

    def layer(self, call: SeamCall) -> None:
        tokens = call.tokens
        if tokens.batch_shape is None:
            raise UserError(
                f"{call.layer.name}: {len(call.hidden)} tokens that are not those of the running "
                "batch cannot be traced (are there images in the batch?)."
            )
        if tokens.forward_id not in self._forwards:
            if not self._in_batch and not self._continues(call):
                self._flush_samples()
            self._forwards[tokens.forward_id] = _begin(call)
        forward = self._forwards[tokens.forward_id]
        forward.layers[call.layer.position] = self._copied(call)

    def end_batch(self) -> None:
        self._flush_samples()
        self._in_batch = False
        self._labels = None

    def close(self) -> None:
        self._flush_samples()
        if self._pending or not self._chunks:
            self._write_chunk()
        if self._directory is not None and self._out is not None:
            write_header(self._directory, self._header, [c.num_tokens for c in self._chunks])
            finish_directory(self._directory, self._out)
            self._chunks = [
                FileChunk(self._out / c.path.name, c.num_tokens)
                for c in self._chunks
                if isinstance(c, FileChunk)
            ]
        self.trace.header, self.trace.chunks = self._header, self._chunks

    # -- from calls to samples --

    def _continues(self, call: SeamCall) -> bool:
        first = next(iter(self._forwards.values()), None)
        batch_size = first.batch_shape[0] if first is not None else None
        shape = call.tokens.batch_shape
        return call.tokens.past_length > 0 and shape is not None and shape[0] == batch_size

    def _copied(self, call: SeamCall) -> dict[str, Tensor]:
        layer = self._header.layers[call.layer.position]
        if call.ids.shape[1] != layer.top_k:
            raise UserError(
                f"{layer.name}: a token has {call.ids.shape[1]} experts and not {layer.top_k}; "
                "such a routing transform cannot be traced."
            )
        id_dtype = torch.int8 if layer.num_choices <= 128 else torch.int16
        parts = {
            "ids": call.ids.detach().to("cpu", id_dtype, copy=True),
            "weights": call.weights.detach().to("cpu", copy=True),
        }
        if self._header.logits:
            if call.logits is None:
                raise UserError("a trace with logits needs a pass with logits=True.")
            parts["logits"] = call.logits.detach().to("cpu", copy=True)
        return parts

    def _flush_samples(self) -> None:
        forwards = [f for f in self._forwards.values() if f.layers]
        self._forwards.clear()
        if not forwards:
            return
        order, lengths = _sample_order(forwards)
        phases = [torch.full((len(f.tokens),), f.phase, dtype=torch.uint8) for f in forwards]
        tensors = {
            "tokens": torch.cat([f.tokens for f in forwards])[order],
            "phase": torch.cat(phases)[order],
        }
        for position in range(len(self._header.layers)):
            for kind in ("ids", "weights", *(["logits"] if self._header.logits else [])):
                rows = [self._rows(f, position, kind) for f in forwards]
                tensors[f"{kind}.{position}"] = torch.cat(rows)[order]
        self._pending.append(tensors)
        self._header.lengths += lengths
        self._header.sample_domains += [self._label(row) for row in range(len(lengths))]
        if sum(t.nbytes for part in self._pending for t in part.values()) >= self._chunk_bytes:
            self._write_chunk()

    def _rows(self, forward: _Forward, position: int, kind: str) -> Tensor:
        parts = forward.layers.get(position)
        if parts is not None:
            return parts[kind]
        layer, count = self._header.layers[position], len(forward.tokens)
        if kind == "ids":
            return torch.full((count, layer.top_k), -1, dtype=torch.int8)
        width = layer.top_k if kind == "weights" else layer.num_choices
        return torch.zeros(count, width, dtype=torch.bfloat16)

    def _label(self, row: int) -> int:
        label = self._labels[row] if self._labels is not None else self._domain
        if label not in self._header.domains:
            self._header.domains.append(label)
        return self._header.domains.index(label)

    def _write_chunk(self) -> None:
        parts = self._pending or [self._empty()]
        tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        self._pending = []
        if self._directory is None:
            self._chunks.append(MemoryChunk(tensors))
        else:
            self._chunks.append(write_chunk(self._directory, len(self._chunks), tensors))

    def _empty(self) -> dict[str, Tensor]:
        return {
            name: torch.zeros((0,) if width is None else (0, width))
            for name, width in self._header.widths().items()
        }


def _begin(call: SeamCall) -> _Forward:
    shape = call.tokens.batch_shape
    assert shape is not None
    count = len(call.hidden)
    mask, ids = call.tokens.mask, call.tokens.input_ids
    return _Forward(
        shape,
        DECODE if call.phase == "decode" else PREFILL,
        mask.cpu() if mask is not None else torch.ones(count, dtype=torch.bool),
        ids.to("cpu", torch.int32, copy=True)
        if ids is not None
        else torch.full((count,), -1, dtype=torch.int32),
    )


def _sample_order(forwards: list[_Forward]) -> tuple[Tensor, list[int]]:
    """Return the rows of the concatenated forwards sample by sample, unpadded, and lengths."""
    by_sample: dict[int, list[Tensor]] = {}
    offset = 0
    for forward in forwards:
        batch, length = forward.batch_shape
        rows = torch.arange(offset, offset + batch * length).view(batch, length)
        for b, (row, kept) in enumerate(zip(rows, forward.mask.view(batch, length), strict=True)):
            by_sample.setdefault(b, []).append(row[kept])
        offset += batch * length
    samples = [torch.cat(parts) for parts in by_sample.values()]
    return torch.cat(samples), [len(sample) for sample in samples]


@contextmanager
def tracing(
    view: MoEView, out: str | Path | None = None, *, logits: bool = False, domain: str = ""
) -> Iterator[RoutingTrace]:
    """Record the routing of every forward of the view's model; see `MoEView.trace`."""
    writer = TraceWriter(out, logits=logits, domain=domain)
    writer.start(view)
    with observe(view, writer.layer, logits=logits):
        yield writer.trace
    writer.close()
