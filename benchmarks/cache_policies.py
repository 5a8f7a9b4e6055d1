"""Demand hit rates of every cache policy beside Belady's optimum, on real routing.

    moekit trace babel TEXT... --logits --out tune      # text to choose settings on
    moekit trace babel OTHER... --logits --out held     # text to report on
    OMP_NUM_THREADS=1 python benchmarks/cache_policies.py --tune tune --trace held

replays decoding, one token at a time, through caches of 60, 35 and 20 % of the experts, in slots
shared by the layers and in slots for each, no prefetch, the cold start counted. It chooses the half
life of the default on the first trace, reports all policies on the second, and writes
`benchmarks/results/cache_policies.json`. `knows n` keeps what this token and the next n - 1 will
use, which is known to no policy that runs. It stops where a policy is above the optimum, or where
the cache that runs does not hit exactly what the simulator says.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moekit.analyze.reading import pieces, rows_of
from moekit.core.cache_score import CacheScore, policy
from moekit.core.packed import PAGE
from moekit.core.record import start_record
from moekit.core.registry import registry
from moekit.core.replay import accesses, replay
from moekit.core.trace import RoutingTrace
from moekit.runtime.expert_cache import ExpertCache

RESULT = Path(__file__).parent / "results" / "cache_policies.json"
SHARES = (0.6, 0.35, 0.2)
TARGETS = (0.95, 0.95, 0.85)
HALF_LIVES = (8, 16, 32, 64, 128, 256, 512)
FORESIGHT = (2, 3, 5)
# Experts that gain in the recent-score policy, in units of K.
NEAR = 2


class Routing:
    """About `max_tokens` tokens of a trace: whole samples, evenly spaced, one after another."""

    def __init__(self, trace: RoutingTrace, max_tokens: int, *, gains: bool = False) -> None:
        rows = rows_of(pieces(trace, max_tokens, len(trace)))
        self.layers, self.tokens = len(trace.layers), len(rows)
        ids, self.experts = accesses(trace)
        self.width = ids.shape[2]
        self.ids = ids[rows]
        self.gains = self._gains(trace, rows) if gains else None

    def _gains(self, trace: RoutingTrace, rows: NDArray) -> tuple[NDArray, NDArray]:
        logits = [trace.layer(n).logits[torch.from_numpy(rows)] for n in range(self.layers)]
        scores = torch.softmax(torch.stack(logits, 1).float(), -1)
        best = scores.topk(NEAR * self.width)
        return best.indices.numpy(), best.values.double().numpy()

    def slots(self, share: float, shared: bool) -> int:
        return int(share * self.experts * (self.layers if shared else 1))

    def hit_rates(
        self, score: CacheScore, shared: bool, profile: NDArray | None = None
    ) -> NDArray[np.float64]:
        """By share, [3]."""
        capacities = [self.slots(share, shared) for share in SHARES]
        options: dict[str, Any] = {"hold": True, "profile": profile, "gains": self.gains}
        if not shared:
            return replay(self.ids, self.experts, score, capacities, **options).hit_rate
        if profile is not None:
            options["profile"] = profile.reshape(1, -1)
        if self.gains is not None:
            best, scores = self.gains
            options["gains"] = (self._pooled(best), scores.reshape(-1, 1, best.shape[2]))
        total = self.layers * self.experts
        return replay(
            self._pooled(self.ids), total, score, capacities, layers=self.layers, **options
        ).hit_rate

    def _pooled(self, ids: NDArray) -> NDArray:
        first = np.arange(self.layers)[:, None] * self.experts
        return (ids + first).reshape(-1, 1, ids.shape[2])

    def counts(self) -> NDArray[np.float64]:
        """Uses by layer and expert."""
        rows = [np.bincount(c.ravel(), minlength=self.experts) for c in np.moveaxis(self.ids, 1, 0)]
        return np.stack(rows).astype(np.float64)


def run_cache(routing: Routing, name: str, share: float, shared: bool) -> float:
    """The hit rate of the cache that runs, on records without content."""
    store: Any = SimpleNamespace(
        layers=[SimpleNamespace(num_experts=routing.experts)] * routing.layers,
        nbytes=lambda layer, expert: PAGE,
        fetch=lambda buffer, layer, expert: None,
    )
    slots = routing.slots(share, shared) * (1 if shared else routing.layers)
    with ExpertCache(store, slots * PAGE, policy=name, per_layer=not shared, readers=1) as cache:
        for token, layer in itertools.product(range(routing.tokens), range(routing.layers)):
            with cache.begin(layer, routing.ids[token, layer]) as claim:
                for _ in claim.arrivals():
                    pass
        return cache.stats.hit_rate


def measure(held: Routing, learned: Routing, shared: bool) -> list[dict[str, Any]]:
    best = held.hit_rates(policy("belady"), shared)
    random = np.random.default_rng(0).random((held.layers, held.experts))
    scores: list[tuple[str, CacheScore, NDArray | None]] = [
        ("random set", policy("hot-set"), random),
        *((m.name, policy(m.name), learned.counts()) for m in registry.methods(kind="policy")),
    ]
    steps = held.layers if shared else 1
    scores += [
        (f"knows {n}", CacheScore(future="window", window=n * steps), None) for n in FORESIGHT
    ]
    rows = []
    for name, score, profile in scores:
        found = held.hit_rates(score, shared, profile)
        if (found > best + 1e-12).any():
            raise SystemExit(f"{name} is above the optimum")
        of_best = (found / best).round(4).tolist()
        rows.append({"policy": name, "hit_rate": found.round(4).tolist(), "of_belady": of_best})
        print(f"{'shared' if shared else 'per layer':9} {name:14} {found.round(3)} {of_best}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tune", type=Path, required=True)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=8192)
    options = parser.parse_args()
    inputs = [options.tune, options.trace]
    record = start_record("benchmarks/cache_policies", vars(options), seed=0, inputs=inputs)
    learned = Routing(RoutingTrace.open(options.tune), options.tokens)
    held = Routing(RoutingTrace.open(options.trace), options.tokens, gains=True)
    metrics: dict[str, Any] = {
        "shares": SHARES,
        "targets_of_belady": TARGETS,
        "tokens": held.tokens,
        "slots_per_layer": [held.slots(share, False) for share in SHARES],
        "slots_shared": [held.slots(share, True) for share in SHARES],
    }
    for shared in (False, True):
        place = "shared" if shared else "per layer"
        half_lives = {}
        for half_life in HALF_LIVES:
            score = CacheScore(frequency=True, half_life=float(half_life), distance=True)
            half_lives[half_life] = learned.hit_rates(score, shared).round(4).tolist()
            print(f"{place:9} half life {half_life:4} {half_lives[half_life]}")
        rows = measure(held, learned, shared)
        of_auto = next(row for row in rows if row["policy"] == "auto")
        for share, expected in zip(SHARES, of_auto["hit_rate"], strict=True):
            if round(run_cache(held, "auto", share, shared), 4) != expected:
                raise SystemExit("the cache that runs does not decide as the simulator does")
        metrics[place] = {"half_life_on_tune": half_lives, "policies": rows}
    record.finish(metrics)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(json.loads(record.to_json()), indent=2) + "\n")


if __name__ == "__main__":
    main()
