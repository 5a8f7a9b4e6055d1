"""Tokens a second before anything is loaded: this machine's bandwidths, the model's bytes.

The roofline itself is `perf_model`. One sequence. Without a trace of the model's routing it is
taken to be as uniform as it could be; real routing repeats itself, so it is faster.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PretrainedConfig

from moekit.core.architecture import read_config
from moekit.core.cache_score import policy as score_of
from moekit.core.load import PACKED_FILE
from moekit.core.machine import available_memory, charged_memory
from moekit.core.memory import part_bytes
from moekit.core.packed_header import PackedHeader
from moekit.core.spec import MoESpec
from moekit.ops import native
from moekit.ops.native.formats import plain_format
from moekit.runtime.budget import PROGRAM_GROWTH, Budget, Needs, leaves_on_disk, plan_budget
from moekit.runtime.choose import choose_codec, experts
from moekit.runtime.context import context_length
from moekit.runtime.decoder_shape import supports
from moekit.runtime.disk_speed import DiskSpeed, disk_speed, file_speed
from moekit.runtime.expert_cache import record_sizes
from moekit.runtime.known_routing import expected_hit_rate, open_trace
from moekit.runtime.perf_model import (
    DecodeForecast,
    DecodeLoad,
    Machine,
    decode_roofline,
    expected_distinct,
)
from moekit.runtime.prefetch import PREDICTION_SECONDS, pays
from moekit.runtime.store import ExpertStore

# Bytes and columns of a matrix that no cache of a CPU holds.
PROBE_BYTES, PROBE_COLUMNS = 2**27, 4096
PROBE_SECONDS = 0.2
# Seconds a MoE layer takes besides its bytes, measured on two cores of Zen 4: calls and barriers;
# claims where experts come and go; in transformers' modules many small operations. Predicting the
# next layers' experts comes on top where it is done.
LAYER_SECONDS = {
    ("native", True): 4e-5,
    ("native", False): 3e-4,
    ("graph", True): 1.05e-3,
    ("graph", False): 2.7e-3,
}
STEP_SECONDS = 1e-4
# Rows of a step, and vectors of the model's width that a row needs.
ROWS, VECTORS = 256, 12


@dataclass(frozen=True)
class DecodePlan:
    """What a model will take and do under a limit: its budget, and the forecast at `hit_rate`."""

    budget: Budget
    machine: Machine
    load: DecodeLoad
    num_experts: int
    hit_rate: float
    forecast: DecodeForecast
    notes: tuple[str, ...]

    def at(self, hit_rate: float) -> DecodeForecast:
        """The forecast for another share of experts found in memory."""
        return decode_roofline(self.load, self.machine, hit_rate=hit_rate)

    def together(self, streams: int, flops: float | None = None) -> DecodeForecast:
        """The forecast for so many sequences that decode together, at the same hit rate and at most
        `flops` operations a second; they choose experts independently of each other."""
        distinct = expected_distinct(self.num_experts, round(self.load.distinct), streams)
        load = replace(self.load, batch=streams, distinct=distinct)
        return decode_roofline(load, replace(self.machine, flops=flops), hit_rate=self.hit_rate)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "memory": self.budget.to_dict(),
            "hit_rate": self.hit_rate,
            "memory_bandwidth": self.machine.memory_bandwidth,
            "disk_bandwidth": self.machine.disk_bandwidth,
            "disk_latency": self.machine.disk_latency,
            "tokens_per_second": self.forecast.tokens_per_second,
            "bound": self.forecast.bound,
            "notes": list(self.notes),
        }


def memory_bandwidth(
    threads: int, nbytes: int = PROBE_BYTES, seconds: float = PROBE_SECONDS
) -> float:
    """Bytes a second at which `threads` threads read a matrix of about `nbytes` bytes in a product
    with one vector; a small one is measured in the caches."""
    rows = max(1, nbytes // (128 * PROBE_COLUMNS)) * 64
    matrix = torch.zeros(rows, PROBE_COLUMNS, dtype=torch.bfloat16)
    library = native.library()
    pool = native.Pool(library, threads) if library is not None else None
    described = plain_format((rows, PROBE_COLUMNS), torch.bfloat16)
    x = torch.ones(1, PROBE_COLUMNS)
    count, best, start = 0, float("inf"), time.perf_counter()
    while count < 3 or time.perf_counter() - start < seconds:
        began = time.perf_counter()
        if pool is not None:
            pool.matmul(described, matrix.data_ptr(), x)
        else:
            torch.mv(matrix, x[0].to(matrix.dtype))
        best = min(best, time.perf_counter() - began)
        count += 1
    if pool is not None:
        pool.close()
    return matrix.nbytes / best


def plan_decode(
    directory: Path,
    limit: int | None = None,
    *,
    expert_cache: int | None = None,
    codec: str | None = None,
    resident_codec: str | None = None,
    runner: str = "auto",
    max_context: int | None = None,
    streams: int = 1,
    threads: int = 1,
    policy: str = "auto",
    trace: str | Path | None = None,
    hit_rate: float | None = None,
) -> DecodePlan:
    """Plan the model in `directory`, packed or not, under `limit` bytes, and forecast its decoding.

    Nothing of the model is loaded; bandwidths are measured in about a second. The share of experts
    found in memory is `hit_rate`, or what replaying a `trace` of the model through the `policy`
    gives, or what uniform routing would. Raises UserError with the numbers for what cannot fit.
    """
    config = read_config(directory)
    spec = MoESpec.from_config(config)
    charged, left = charged_memory(), available_memory()
    sizes, disk, notes = _experts(directory, spec, codec, limit if limit is not None else left)
    native_reason = supports(config) if native.library() is not None else "no C++ compiler"
    is_native = runner == "native" or (runner == "auto" and native_reason is None)
    if not is_native:
        notes += (f"graph runner: {native_reason or 'asked for'}",)
    context, kv_bytes = _context(config, max_context)
    resident, read = _resident_bytes(spec, resident_codec or _stored_codec(directory))
    beside = charged + PROGRAM_GROWTH + resident
    if is_native and leaves_on_disk(limit, beside, sizes, charged + left, expert_cache):
        # The embedding stays there too, unless it is the output head.
        resident = read
    needs = Needs(
        charged + PROGRAM_GROWTH,
        resident,
        streams * kv_bytes * context,
        _scratch(spec),
        streams=streams,
        max_context=context,
    )
    budget = plan_budget(limit, needs, sizes, spec.top_k, charged + left, expert_cache)
    layer_seconds = LAYER_SECONDS["native" if is_native else "graph", budget.complete]
    if not budget.complete and pays(sizes, disk.bandwidth):
        layer_seconds += PREDICTION_SECONDS
    machine = Machine(
        # The probe stays within the limit too.
        memory_bandwidth=memory_bandwidth(
            threads, min(PROBE_BYTES, max(0, budget.limit - charged) // 2)
        ),
        disk_bandwidth=disk.bandwidth,
        disk_latency=disk.latency,
        layer_seconds=layer_seconds,
        step_seconds=STEP_SECONDS,
    )
    load = DecodeLoad(
        resident_bytes=read,
        layers=len(spec.per_layer),
        distinct=sum(layer.top_k for layer in spec.per_layer) / len(spec.per_layer),
        expert_bytes=float(sizes[sizes > 0].mean()),
        active_params=spec.params.active_no_embedding + spec.vocab_size * spec.hidden_size,
        kv_bytes=kv_bytes,
        context=min(256, context),
    )
    rate = hit_rate
    if rate is None and trace is not None and not budget.complete:
        slots = int(budget.expert_cache // load.expert_bytes)
        known = open_trace(trace, [layer.num_experts for layer in spec.per_layer])
        rate = expected_hit_rate(known, score_of(policy), slots)
    if rate is None:
        rate = min(1.0, budget.expert_cache / budget.all_experts)
    forecast = decode_roofline(load, machine, hit_rate=rate)
    return DecodePlan(budget, machine, load, spec.num_experts, rate, forecast, notes)


def _experts(
    directory: Path, spec: MoESpec, codec: str | None, memory: int
) -> tuple[NDArray[np.int64], DiskSpeed, tuple[str, ...]]:
    """Bytes of the experts [L, E], the disk's speed, and what was chosen."""
    if (directory / PACKED_FILE).is_file():
        with ExpertStore.open(directory) as store:
            return record_sizes(store), disk_speed(store), ()
    notes: tuple[str, ...] = ()
    if codec in (None, "auto"):
        choice = choose_codec(spec, memory)
        codec, notes = choice.codec, (choice.reason,)
    assert codec is not None
    count = sum(layer.num_experts for layer in spec.per_layer)
    shape = (len(spec.per_layer), spec.num_experts)
    sizes = np.full(shape, -(-experts(spec, codec) // count), dtype=np.int64)
    files = sorted(directory.glob("*.safetensors"), key=lambda file: -file.stat().st_size)
    return sizes, file_speed(files[0]), notes


def _resident_bytes(spec: MoESpec, resident_codec: str | None) -> tuple[int, int]:
    """Bytes of all but the routed experts, and of what a step reads of them: the embedding is a
    table of which it needs one row, unless it is the output head too."""
    stored = {"float32": 32, "float16": 16}.get(spec.dtype or "", 16)
    bits = stored
    if resident_codec is not None:
        bits = {"int8": 8, "int4": 4}.get(resident_codec, stored)
    parts = dict(spec.params.parts, routed=0)
    table = spec.vocab_size * spec.hidden_size
    parts["embedding"] -= 0 if spec.tied_embeddings else table
    read = sum(part_bytes(part, params, bits) for part, params in parts.items())
    return read + (0 if spec.tied_embeddings else part_bytes("embedding", table, stored)), read


def _stored_codec(directory: Path) -> str | None:
    """The codec of the resident part of a packed model that is stored encoded."""
    if not (directory / PACKED_FILE).is_file():
        return None
    encoded = PackedHeader.read(directory).encoded
    return None if encoded is None else encoded.codec.name


def _scratch(spec: MoESpec) -> int:
    chosen = spec.top_k * (spec.hidden_size + 2 * spec.expert_width)
    return 4 * ROWS * (VECTORS * spec.hidden_size + chosen) + 12 * spec.vocab_size


def _context(config: PretrainedConfig, asked: int | None) -> tuple[int, int]:
    """Tokens of a sequence, and bytes of keys and values a token in 16 bits."""
    text: Any = config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return context_length(config, asked), 4 * heads * dim * text.num_hidden_layers
