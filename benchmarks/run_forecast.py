"""Forecast of `moekit run --dry-run` beside measured decoding, on five settings.

    python benchmarks/run_forecast.py --work DIR

DIR keeps a packed model of the reference shape R1 (0.9 GB, made by the first run). Two forecasts:
for routing that never repeats itself, and with the hit rate of a trace of other tokens, replayed. A
prompt fills the expert cache before the measurement. Run on an idle machine. Writes
benchmarks/results/run_forecast.json.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from reference_shapes import write_packed

import moekit
from moekit.core.cache_score import policy
from moekit.core.record import start_record
from moekit.core.replay import replay
from moekit.runtime.choose_policy import routing_of
from moekit.runtime.forecast_decode import plan_decode
from moekit.runtime.store import ExpertStore

RESULT = Path(__file__).parent / "results" / "run_forecast.json"
# Runner, share of the experts in memory, tokens measured.
SETTINGS = (
    ("native", 1.0, 60),
    ("native", 0.6, 40),
    ("native", 0.3, 30),
    ("graph", 1.0, 20),
    ("graph", 0.3, 15),
)
CONTEXT, PROMPT = 512, 100


def traced(packed: Path) -> tuple[NDArray[np.int32], int]:
    """The routing of other tokens, and how many steps of it the prompt takes."""
    ids = torch.randint(0, 32000, (PROMPT + 60,), generator=torch.Generator().manual_seed(1))
    with moekit.open_engine(packed, max_context=CONTEXT, streams=1) as engine:
        layers, experts = len(engine.spec.per_layer), engine.spec.num_experts
        return routing_of(engine, ids.tolist(), experts), PROMPT * layers


def trace_rate(steps: NDArray[np.int32], first: int, shape: tuple[int, int], slots: int) -> float:
    """Hit rate after the prompt with the default policy and `slots` for all layers [L, E]."""
    layers, experts = shape
    whole, prompt = (
        replay(part, layers * experts, policy("auto"), [slots], layers=layers, hold=True)
        for part in (steps, steps[:first])
    )
    hits = whole.hits.sum() - prompt.hits.sum()
    return float(hits / (whole.accesses.sum() - prompt.accesses.sum()))


def measure(packed: Path, everything: int, threads: int) -> list[dict[str, Any]]:
    ids = torch.randint(0, 32000, (CONTEXT,), generator=torch.Generator().manual_seed(0)).tolist()
    steps, first = traced(packed)
    rows = []
    for runner, share, count in SETTINGS:
        cache = int(share * everything)
        plan = plan_decode(packed, expert_cache=cache, runner=runner, threads=threads)
        shape = plan.load.layers, 64
        slots = int(share * shape[0] * shape[1])
        expected = 1.0 if plan.budget.complete else trace_rate(steps, first, shape, slots)
        forecast = plan.at(expected).tokens_per_second
        with moekit.open_engine(
            packed,
            threads=threads,
            expert_cache=cache,
            runner=runner,
            max_context=CONTEXT,
            streams=1,
        ) as engine:
            assert engine.cache is not None
            if plan.budget.complete:
                engine.cache.load_all()
            sequence = engine.runner.new_sequence(CONTEXT)
            engine.runner.forward([sequence], [ids[:PROMPT]])
            before = engine.cache.stats.hits, engine.cache.stats.misses
            start = time.perf_counter()
            for token in ids[PROMPT : PROMPT + count]:
                engine.runner.forward([sequence], [[token]])
            seconds = time.perf_counter() - start
            after = engine.cache.stats.hits, engine.cache.stats.misses
        hits, misses = (b - a for a, b in zip(before, after, strict=True))
        measured = count / seconds
        rate = hits / (hits + misses) if hits + misses else 1.0
        row = {
            "runner": runner,
            "share": share,
            "measured": measured,
            "hit_rate": rate,
            "forecast_uniform": plan.forecast.tokens_per_second,
            "expected_hit_rate": expected,
            "forecast": forecast,
            "ratio": forecast / measured,
            "plan": plan.to_dict(),
        }
        rows.append(row)
        print(
            f"{runner} {share:.0%}: measured {measured:.1f}, forecast {forecast:.1f} tokens/s "
            f"({forecast / measured:.2f}), {rate:.0%} in memory, expected {expected:.0%}; uniform "
            f"{row['forecast_uniform']:.1f}",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    packed = given.work / "r1-int4"
    if not packed.exists():
        given.work.mkdir(parents=True, exist_ok=True)
        write_packed("r1", packed, "int4")
    with ExpertStore.open(packed) as store:
        everything = store.expert_bytes
    record = start_record("benchmarks/run_forecast.py", {"threads": given.threads}, seed=0)
    rows = measure(packed, everything, given.threads)
    RESULT.write_text(record.finish({"rows": rows}).to_json())


if __name__ == "__main__":
    main()
