"""Decoding under memory limits: speed, hits beside Belady's, and the forecast beside the measured.

Shapes: T tokens, L MoE layers, K chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moekit.bench.programs import Programs
from moekit.core.cache_score import CacheScore, policy
from moekit.core.replay import replay
from moekit.runtime.forecast_decode import plan_decode
from moekit.runtime.store import ExpertStore

BELADY = CacheScore(future="next use")


@dataclass(frozen=True)
class Limit:
    """What an engine may take, in bytes: the process, or the experts in memory."""

    memory: int | None = None
    expert_cache: int | None = None

    @property
    def options(self) -> tuple[str, str]:
        """For `worker_moekit`."""
        if self.memory is not None:
            return "--memory", str(self.memory)
        return "--expert-cache", str(self.expert_cache)


def decode(
    programs: Programs, ids: Sequence[int], first: int, *options: str
) -> tuple[float, dict[str, Any]]:
    """Tokens a second after the first `first` tokens, given one by one, and the worker's stats."""
    with programs.moekit("--context", str(len(ids) + 1), *options) as worker:
        worker.call("prefill", ids=list(ids[:1]))
        worker.call("decode", ids=list(ids[1:first]))
        seconds = sum(worker.call("decode", ids=list(ids[first:])))
        stats = worker.call("stats")
    return (len(ids) - first) / seconds, stats


def routing(programs: Programs, ids: Sequence[int], limit: Limit) -> tuple[NDArray[np.int32], int]:
    """What the routers choose for `ids`: [T * L, 1, K], an expert counted over all layers; and the
    checksum of the logits."""
    options = (*limit.options, "--no-prefetch", "--record-routing")
    _, stats = decode(programs, ids, 1, *options)
    with ExpertStore.open(programs.packed) as store:
        counts = [layer.num_experts for layer in store.layers]
    steps = np.array(stats["routing"], dtype=np.int32)
    layer = np.arange(len(steps)) % len(counts)
    real = (steps >= 0) & (steps < np.array(counts)[layer][:, None])
    steps = np.where(real, steps + (layer * max(counts))[:, None], -1).astype(np.int32)
    return steps[:, None], stats["checksum"]


def run_under(
    programs: Programs,
    limit: Limit,
    ids: Sequence[int],
    steps: NDArray[np.int32],
    checksum: int,
) -> dict[str, Any]:
    """One limit: measured over the second half of `ids`, the first fills the cache.

    The forecast knows the routing of the first half only. No speed where the logits are not bit for
    bit those of `checksum`.
    """
    half = len(ids) // 2
    plan = plan_decode(
        programs.packed,
        limit.memory,
        expert_cache=limit.expert_cache,
        threads=programs.threads,
        max_context=len(ids) + 1,
    )
    layers = plan.load.layers
    slots = int(plan.budget.expert_cache // plan.load.expert_bytes)
    experts = plan.budget.all_experts / plan.load.expert_bytes

    def rate(score: CacheScore, part: NDArray[np.int32]) -> float:
        found = replay(part, round(experts), score, [slots], layers=layers, hold=True)
        return float(found.hit_rate[0])

    _, off = decode(programs, ids, half, *limit.options, "--no-prefetch")
    speed, on = decode(programs, ids, half, *limit.options)
    expected = 1.0 if plan.budget.complete else rate(policy("auto"), steps[: half * layers])
    forecast = plan.at(expected).tokens_per_second
    found: dict[str, Any] = {
        **asdict(limit),
        "limit": plan.budget.limit,
        "expert_share": min(1.0, plan.budget.expert_cache / plan.budget.all_experts),
        # Where everything is in memory hits are not counted, misses are.
        "hit_rate": 1 - off["engine"]["misses"] / np.count_nonzero(steps >= 0),
        "belady": rate(BELADY, steps),
        "bytes_read": on["engine"]["bytes_read"],
        "peak_bytes": on["engine"]["peak_bytes"],
        "expected_hit_rate": expected,
        "forecast": forecast,
        "ok": off["checksum"] == on["checksum"] == checksum,
    }
    if found["ok"]:
        found |= {"tokens_per_second": speed, "forecast_ratio": forecast / speed}
    return found
