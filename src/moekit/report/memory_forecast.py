"""How a model would run in a given memory: how many experts fit, and how often one is missing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moekit.analyze import Result
from moekit.core.memory import bits_per_weight, fits, part_bytes

if TYPE_CHECKING:
    from moekit.core.spec import MoESpec

# What an ordinary NVMe drive reads, in bytes a second; the page says so.
DRIVE = 2e9


@dataclass(frozen=True)
class MemoryForecast:
    """What `memory` bytes hold of the model: all of it, or `slots` of `num_experts` a layer.

    Hit rates are those of an LRU cache and of the best possible choice; `read_bytes` is what a
    token then reads from the drive with LRU, in the mean.
    """

    memory: int
    needed: int
    resident: int
    expert_bytes: int
    whole: bool
    slots: int
    num_experts: int
    lru: float | None = None
    belady: float | None = None
    read_bytes: float | None = None

    @property
    def seconds(self) -> float | None:
        """Reading time of a token at 2 GB/s."""
        return None if self.read_bytes is None else self.read_bytes / DRIVE


def memory_forecast(
    spec: MoESpec, memory: int, bits: float, curve: Result | None
) -> MemoryForecast:
    """Forecast demand reading with the hit rates of the measured cache curve."""
    fit = fits(spec.params.parts, memory, (round(bits),))[0]
    routed = part_bytes("routed", spec.params.routed, bits)
    needed = spec.bytes(bits)
    slots = int(fit.expert_fraction * spec.num_experts)
    mean = np.mean([layer.params_per_expert for layer in spec.per_layer])
    expert_bytes = round(float(mean) * bits_per_weight(bits) / 8)
    found = MemoryForecast(
        memory, needed, needed - routed, expert_bytes, fit.whole, slots, spec.num_experts
    )
    if fit.whole or curve is None or slots < spec.top_k:
        return found
    sizes = curve.column("slots")
    lru = float(np.interp(slots, sizes, curve.column("lru")))
    belady = float(np.interp(slots, sizes, curve.column("belady")))
    chosen = sum(layer.top_k * layer.params_per_expert for layer in spec.per_layer)
    read = (1 - lru) * chosen * bits_per_weight(bits) / 8
    return MemoryForecast(
        memory,
        needed,
        found.resident,
        expert_bytes,
        False,
        slots,
        spec.num_experts,
        lru,
        belady,
        read,
    )
