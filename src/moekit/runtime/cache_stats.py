"""What an expert cache counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class CacheStats:
    """What an expert cache did.

    `hits` and `misses` are experts by layer and step; a hit was in memory when it was asked for.
    `prefetch_hits` were there because of a hint, `late` ones were on their way because of one (and
    are misses). `wasted_bytes` were prefetched and evicted unused. `wait_seconds` is how long
    claims waited for arrivals, `peak_bytes` the most memory that slots took.
    """

    hits: int = 0
    misses: int = 0
    prefetch_hits: int = 0
    late: int = 0
    evictions: int = 0
    demand_reads: int = 0
    demand_bytes: int = 0
    prefetch_reads: int = 0
    prefetch_bytes: int = 0
    preload_reads: int = 0
    preload_bytes: int = 0
    wasted_bytes: int = 0
    wait_seconds: float = 0.0
    peak_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """Bytes brought in, for whatever purpose."""
        return self.demand_bytes + self.prefetch_bytes + self.preload_bytes

    @property
    def hit_rate(self) -> float:
        """Demand hits over accesses; 0 without accesses."""
        return self.hits / max(self.hits + self.misses, 1)
