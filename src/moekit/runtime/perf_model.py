"""How fast a model can decode, from bytes and bandwidths: a roofline.

Arithmetic on numbers that the caller measured or assumes, in bytes, seconds and tokens. Throughput
of large batches is in `moe_lens`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from moekit.core.errors import UserError
from moekit.core.memory import part_bytes
from moekit.core.spec import MoESpec


def expected_distinct(num_experts: int, top_k: int, tokens: int) -> float:
    """Distinct experts of a layer that `tokens` tokens use under uniform independent routing."""
    return num_experts * (1 - (1 - top_k / num_experts) ** tokens)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Bytes a second read from memory and from disk, seconds until the first read of a layer begins
    to give any (`disk_latency`), multiply-adds twice a second (`flops`, None: no limit), seconds
    that a layer and a step take besides (dispatch, synchronisation, sampling).
    """

    memory_bandwidth: float
    disk_bandwidth: float = math.inf
    disk_latency: float = 0.0
    flops: float | None = None
    layer_seconds: float = 0.0
    step_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class DecodeLoad:
    """What one decoding step of `batch` sequences moves.

    `resident_bytes` are read from memory in every step (attention, norms, routers, shared experts,
    output head); of each of `layers` MoE layers `distinct` experts of `expert_bytes` are, and
    `kv_bytes` of the cache for each token of each sequence's `context`. `active_params` are those
    that a token multiplies with.
    """

    resident_bytes: float
    layers: int
    distinct: float
    expert_bytes: float
    active_params: float = 0.0
    kv_bytes: float = 0.0
    context: int = 0
    batch: int = 1

    @classmethod
    def of(
        cls,
        spec: MoESpec,
        *,
        expert_bits: float,
        resident_bits: float = 16,
        kv_bytes: float = 0.0,
        context: int = 0,
        batch: int = 1,
        distinct: float | None = None,
    ) -> DecodeLoad:
        """The load of a model at these bit widths, group scales included below 16.

        `distinct` experts of a layer are used by a step: as under uniform routing unless given.
        """
        parts = spec.params.parts
        # A step reads the head but only a row of the embedding table a token.
        head = spec.vocab_size * spec.hidden_size
        parts = {**parts, "embedding": min(head, parts["embedding"]), "routed": 0}
        layers = len(spec.per_layer)
        expert = sum(layer.params_per_expert for layer in spec.per_layer) / layers
        used = [expected_distinct(x.num_experts, x.top_k, batch) for x in spec.per_layer]
        return cls(
            resident_bytes=sum(part_bytes(p, n, resident_bits) for p, n in parts.items()),
            layers=layers,
            distinct=sum(used) / layers if distinct is None else distinct,
            expert_bytes=part_bytes("routed", round(expert), expert_bits),
            active_params=spec.params.active_no_embedding + head,
            kv_bytes=kv_bytes,
            context=context,
            batch=batch,
        )


@dataclass(frozen=True)
class DecodeForecast:
    """Tokens a second of all sequences together, the seconds of a step, and of what they are made:
    reading memory, computing, reading the disk, and the fixed rest. `bound` names the largest."""

    tokens_per_second: float
    step_seconds: float
    memory_seconds: float
    compute_seconds: float
    disk_seconds: float
    fixed_seconds: float
    bound: str


def decode_roofline(
    load: DecodeLoad, machine: Machine, *, hit_rate: float = 1.0, overlap: float = 0.0
) -> DecodeForecast:
    """Forecast decoding where `hit_rate` of the experts asked for are in memory.

    Reading memory and computing run beside each other, the slower counts. While the missing experts
    of a layer are read, those in memory are computed; `overlap` (0 to 1) is the share of the
    shorter of all computing and all reading that runs beside the other if that is more, 1 for
    perfect prefetch. Raises UserError for a rate or an overlap outside 0 to 1.
    """
    if not (0 <= hit_rate <= 1 and 0 <= overlap <= 1):
        raise UserError(f"hit_rate {hit_rate} and overlap {overlap} must be from 0 to 1")
    experts = load.layers * load.distinct * load.expert_bytes
    cached = load.batch * load.context * load.kv_bytes
    memory = (load.resident_bytes + experts + cached) / machine.memory_bandwidth
    compute = 0.0 if machine.flops is None else 2 * load.active_params * load.batch / machine.flops
    # Layers in which nothing is missing do not wait for a first read.
    waits = load.layers * (1 - hit_rate**load.distinct) * machine.disk_latency
    disk = experts * (1 - hit_rate) / machine.disk_bandwidth + waits
    fixed = load.layers * machine.layer_seconds + machine.step_seconds
    local = max(memory, compute) + fixed
    beside = min(experts * hit_rate / machine.memory_bandwidth, disk)
    seconds = local + disk - max(beside, overlap * min(local, disk))
    parts = {"memory": memory, "compute": compute, "disk": disk, "overhead": fixed}
    return DecodeForecast(
        load.batch / seconds if seconds else math.inf,
        seconds,
        memory,
        compute,
        disk,
        fixed,
        max(parts, key=lambda name: parts[name]),
    )
