"""Models of the common shape, by the native decoder: steps over rows of any number of sequences.

Shapes: B sequences of a step, T tokens of one of them, V vocabulary, D width, K chosen, L MoE
layers, E experts.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from moekit.core.architecture import read_config
from moekit.core.errors import UserError
from moekit.ops.codecs import Codec
from moekit.ops.native import Pool, library
from moekit.ops.native.decoder import KEY_BLOCK, ROW, Decoder, KvShape, kv_shape
from moekit.runtime.claim import Claim
from moekit.runtime.decoder_shape import DecoderShape, NotSupportedError, decoder_shape
from moekit.runtime.decoder_weights import DecoderWeights
from moekit.runtime.expert_cache import ExpertCache
from moekit.runtime.low_bit import LowBitExperts
from moekit.runtime.schedule.sharing import SharedExperts
from moekit.runtime.store import ExpertStore

# Rows of a step. More of them read each expert less often, and take more scratch memory.
MAX_ROWS = 256
# Positions whose angles are computed at once.
POSITIONS = 4096
# A logit whose softmax is 0, and that arithmetic leaves finite.
OUTSIDE = -1e30


class ExpertSource(Protocol):
    """Where experts are: `table` [L, E] (uint64) holds the address of a record, or 0.

    `runtime.expert_cache.ExpertCache` is one.
    """

    table: np.ndarray

    def begin(
        self, layer: int, experts: ArrayLike, *, tokens: int = 1, counts: ArrayLike | None = None
    ) -> Claim:
        """Claim experts of a layer for a step of `tokens` rows, `counts` of which use each."""


class NativeSequence:
    """A sequence and the memory for the keys and values of `capacity` tokens."""

    def __init__(self, capacity: int, shape: KvShape) -> None:
        self.length = 0
        self.capacity = capacity
        self.padded = -(-capacity // KEY_BLOCK) * KEY_BLOCK
        # Pages are taken as they are first written, and are zero before.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        size = max(1, shape.nbytes(self.padded))
        self.memory: mmap.mmap | None = mmap.mmap(-1, size, flags=flags)
        self.address = np.frombuffer(self.memory, np.uint8).ctypes.data

    def truncate(self, length: int) -> None:
        """Forget all tokens after the first `length`; ValueError for more than there are."""
        if not 0 <= length <= self.length:
            raise ValueError(f"truncate to {length} of {self.length} tokens")
        self.length = length


@dataclass(frozen=True)
class Routed:
    """What the router of a MoE layer chose, before its experts are fetched.

    ids and weights [T, K], hidden [T, D]: views that hold until its experts are computed.
    """

    layer: int
    ids: np.ndarray
    weights: np.ndarray
    hidden: np.ndarray


class NativeRunner:
    """Runs a packed model, its experts from `experts` (default: all of them, read now).

    `codec` encodes the matrices of attention, dense and shared MLPs and the output head; None keeps
    them as stored, or in `dtype`. Keys and values are float32 or bfloat16 (`kv_dtype`, default:
    float32 where the matrices are). A step has at most `max_rows` rows; with `embedding_on_disk`
    their embeddings are read when it begins. `observer` is told what every MoE layer chose. A
    token's logits do not depend on the other rows of a step, on how a prompt is cut, on the number
    of threads, nor on which experts were in memory, unless `sharing` or `low_bit` is set, which are
    lossy.

    Raises UserError for a model that `supports` gives a reason against.
    """

    can_truncate = True
    can_chunk = True

    def __init__(
        self,
        store: ExpertStore,
        *,
        experts: ExpertSource | None = None,
        codec: Codec | None = None,
        dtype: torch.dtype | None = None,
        kv_dtype: torch.dtype | None = None,
        threads: int = 1,
        max_rows: int = MAX_ROWS,
        embedding_on_disk: bool = False,
        observer: Callable[[Routed], None] | None = None,
    ) -> None:
        kernels = library()
        if kernels is None:
            raise UserError("the native runner needs a C++ compiler; use the graph runner")
        try:
            self.shape: DecoderShape = decoder_shape(read_config(store.path))
            self._pool = Pool(kernels, threads)
            self.weights = DecoderWeights(
                self.shape,
                store,
                self._pool,
                codec=codec,
                dtype=dtype,
                kv_bf16=kv_dtype == torch.bfloat16,
                max_rows=max_rows,
                embedding_on_disk=embedding_on_disk,
            )
        except NotSupportedError as reason:
            raise UserError(f"the native runner does not run this model: {reason}") from None
        self.kv = kv_shape(self._pool, self.weights.model)
        self.max_rows = max_rows
        self.observer = observer
        self.sharing: SharedExperts | None = None
        self.low_bit: LowBitExperts | None = None
        self.kv_bytes_per_token = self.kv.nbytes(KEY_BLOCK) // KEY_BLOCK
        self.experts: ExpertSource = _all_of(store) if experts is None else experts
        self._decoder = Decoder(self._pool, self.weights.model, self.weights)
        self._moe_layers = [i for i, x in enumerate(self.shape.layers) if x.moe is not None]
        self._positions = 0
        self._rotate(min(POSITIONS, self._longest()))

    @property
    def resident_bytes(self) -> int:
        """Bytes of all weights but the routed experts."""
        return self.weights.nbytes

    @property
    def scratch_bytes(self) -> int:
        """Bytes that steps work in, at most, and those of the tables of angles."""
        tables = sum(cos.nbytes + sin.nbytes for cos, sin in self._angles)
        return self._decoder.scratch_bytes + self.weights.kernel_scratch(self.max_rows) + tables

    @property
    def seconds(self) -> dict[str, float]:
        """Time spent in native code since the start, by stage."""
        return self._decoder.seconds

    def share_experts(self, sharing: SharedExperts) -> None:
        """Let sequences that are run together choose from one set of experts; lossy.

        Raises UserError where routers choose by more than their logits.
        """
        for layer in self.shape.layers:
            router = layer.router
            if router is None:
                continue
            if router.correction is not None or router.spec.num_groups > 1:
                raise UserError(
                    "expert sharing works on logits alone; the routers of this model also choose "
                    "by a correction bias or by groups"
                )
        self.sharing = sharing

    def new_sequence(self, capacity: int) -> NativeSequence:
        """An empty sequence with room for `capacity` tokens."""
        if capacity > self._positions:
            self._rotate(capacity)
        return NativeSequence(capacity, self.kv)

    def _longest(self) -> int:
        return getattr(self.shape.config, "max_position_embeddings", None) or POSITIONS

    def _rotate(self, positions: int) -> None:
        """Make the tables of angles long enough."""
        self._positions = max(positions, min(2 * self._positions, self._longest()))
        made = {
            kind: (cos.numpy(), sin.numpy())
            for kind, (cos, sin) in self.shape.angles(self._positions).items()
        }
        for index, layer in enumerate(self.shape.layers):
            if layer.rotates:
                self._decoder.rotation(index, *made[layer.kind])
        self._angles = list(made.values())

    def forward(
        self,
        seqs: Sequence[NativeSequence],
        tokens: Sequence[Sequence[int]],
        all_positions: bool = False,
    ) -> Tensor | list[Tensor]:
        """Append tokens to each sequence; logits as `Runner.forward` says.

        Raises ValueError for no tokens, for more than a sequence has room for, for ids outside the
        vocabulary, and for a sequence that appears twice.
        """
        rows, counts = self._rows(seqs, tokens)
        ends = np.cumsum(counts) - 1
        wanted = np.arange(len(rows)) if all_positions else ends
        logits = torch.empty(len(wanted), self.shape.vocab)
        out, done = logits.numpy(), 0
        for start in range(0, len(rows), self.max_rows):
            piece = rows[start : start + self.max_rows]
            here = wanted[(wanted >= start) & (wanted < start + len(piece))] - start
            self._step(piece, here.astype(np.int32), out[done : done + len(here)])
            done += len(here)
        for seq, count in zip(seqs, counts, strict=True):
            seq.length += count
        return list(logits.split(counts)) if all_positions else logits

    def _rows(
        self, seqs: Sequence[NativeSequence], tokens: Sequence[Sequence[int]]
    ) -> tuple[np.ndarray, list[int]]:
        counts = [len(new) for new in tokens]
        if len({id(seq) for seq in seqs}) < len(seqs):
            raise ValueError("a sequence appears twice in a step")
        rows = np.empty(sum(counts), ROW)
        start = 0
        for seq, new in zip(seqs, tokens, strict=True):
            if not 0 < len(new) <= seq.capacity - seq.length:
                raise ValueError(f"{len(new)} tokens after {seq.length} of {seq.capacity}")
            part = rows[start : start + len(new)]
            part["kv"], part["capacity"] = seq.address, seq.padded
            part["position"] = np.arange(seq.length, seq.length + len(new))
            part["token"] = new
            start += len(new)
        if len(rows) and not 0 <= rows["token"].min() <= rows["token"].max() < self.shape.vocab:
            raise ValueError(f"token ids outside 0 to {self.shape.vocab - 1}")
        return rows, counts

    def _step(self, rows: np.ndarray, wanted: np.ndarray, out: np.ndarray) -> None:
        if self.weights.rows is not None:
            self.weights.rows.fetch(rows["token"])
            rows["token"] = np.arange(len(rows))
        watched = self.observer is not None or self.sharing is not None
        if not watched and self.experts.table.all():
            self._decoder.step(rows, self.experts.table, wanted, out)
            return
        self._decoder.begin(rows)
        for index, layer in enumerate(self.shape.layers):
            self._decoder.attend(index)
            if layer.moe is not None:
                self._experts(index, layer.moe)
        if len(wanted):
            self._decoder.logits(wanted, out)

    def _experts(self, index: int, moe: int) -> None:
        ids, weights = self._decoder.chosen(index)
        if self.sharing is not None and self.sharing.applies(len(ids)):
            self._share(index, self.sharing)
        if self.observer is not None:
            self.observer(Routed(moe, ids, weights, self._decoder.hidden()))
        needed, counts = (ids[0], None) if len(ids) == 1 else np.unique(ids, return_counts=True)
        low = self.low_bit
        if low is None:
            self._run(index, moe, self.experts, needed, counts, len(ids))
        else:
            falls = low.falls_back(needed, ids, weights, self.experts.table[moe])
            for source, part, formats in (
                (self.experts, ~falls, None),
                (low.cache, falls, low.formats[moe]),
            ):
                own = None if counts is None else counts[part]
                self._run(index, moe, source, needed[part], own, len(ids), formats)
        self._decoder.combine(index)

    def _run(
        self,
        index: int,
        moe: int,
        source: ExpertSource,
        needed: np.ndarray,
        counts: np.ndarray | None,
        tokens: int,
        formats: Any = None,
    ) -> None:
        """Apply the experts `needed` of a layer, those in memory before those that are read."""
        table = source.table[moe]
        with source.begin(moe, needed, tokens=tokens, counts=counts) as claim:
            self._decoder.experts(index, claim.ready, table[claim.ready], formats)
            if len(claim.ready) < len(needed):
                claim.done(claim.ready)
                for arrived in claim.arrivals():
                    self._decoder.experts(index, arrived, table[arrived], formats)
                    claim.done(arrived)

    def _share(self, index: int, sharing: SharedExperts) -> None:
        """Let all rows choose anew within one set of experts."""
        scores = self._decoder.scores(index)
        top_k = self._decoder.layers[index].router.rule.top_k
        outside = ~sharing.chosen(torch.from_numpy(scores), top_k)
        scores[:, outside.numpy()] = OUTSIDE
        self._decoder.choose(index)

    def router_scores(self, layer: int, hidden: np.ndarray) -> np.ndarray:
        """Router logits [T, E] of MoE layer `layer` for any hidden states [T, D].

        With the hidden states of an earlier layer they predict what this one will choose.
        """
        return self._decoder.router_logits(self._moe_layers[layer], hidden)

    def drop(self, seq: NativeSequence) -> None:
        """Give back the memory of a sequence."""
        seq.memory = None
        seq.capacity = 0

    def close(self) -> None:
        """Give back weights and threads; nothing may be called afterwards."""
        if self.low_bit is not None:
            self.low_bit.cache.close()
        self._decoder.close()
        self._pool.close()
        if self.weights.rows is not None:
            self.weights.rows.close()


def _all_of(store: ExpertStore) -> ExpertCache:
    cache = ExpertCache(store, store.expert_bytes)
    cache.load_all()
    return cache
