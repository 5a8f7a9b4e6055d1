"""R2, of 30 billion parameters, in less memory than it has, each token's experts drawn at random.

    python benchmarks/run_uniform_routing.py --work DIR [--limits 14GB 9GB] [--runs 3]

Uniform routing is the worst case: no policy finds more than the share of the experts that is in
memory, and no predictor knows the next one. DIR keeps the packed model (18 GB, made by the first
run, attention and output head at 4 bits too). Each run is a process of its own in a memory cgroup,
the first without a limit, whose peak charge must stay within the sum that the engine prints, the
others with it. A token is drawn, its experts are drawn in the place of those that the routers
chose, and all of them are computed; the first tokens fill the cache. Needs root, for the cgroups.
Writes benchmarks/results/run_uniform_routing.json; nothing is written where a limit was passed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from memory_cgroup import MemoryCgroup
from reference_shapes import write_packed

from moekit.core.memory import bytes_of
from moekit.core.record import start_record

RESULT = Path(__file__).parent / "results" / "run_uniform_routing.json"
CODEC, CONTEXT, THREADS = "int4", 1024, 2


def child(packed: str, memory: int, tokens: int, seed: int) -> None:
    """Open, decode, and print what was planned and done."""
    import numpy as np

    import moekit
    from moekit.runtime.native_runner import NativeRunner, Routed

    started = time.perf_counter()
    with moekit.open_engine(
        packed, memory, threads=THREADS, max_context=CONTEXT, streams=1
    ) as engine:
        opening = time.perf_counter() - started
        runner, cache, budget = engine.runner, engine.cache, engine.budget
        assert isinstance(runner, NativeRunner)
        assert cache is not None
        assert budget is not None
        draw, watch = np.random.default_rng(seed), runner.observer

        def uniform(routed: Routed) -> None:
            for row in routed.ids:
                row[:] = np.sort(draw.choice(cache.table.shape[1], len(row), replace=False))
            if watch is not None:
                watch(routed)

        runner.observer = uniform
        sequence, seconds = runner.new_sequence(CONTEXT), []
        vocabulary = runner.shape.vocab
        for token in draw.integers(0, vocabulary, tokens).tolist():
            started = time.perf_counter()
            runner.forward([sequence], [[token]])
            seconds.append(time.perf_counter() - started)
        found = {
            "opening_seconds": opening,
            "seconds": seconds,
            "budget": budget.to_dict(),
            "limit": budget.limit,
            "cache": dataclasses.asdict(cache.stats),
            "bytes_read": engine.stats.bytes_read,
            "hit_rate": engine.stats.hit_rate,
            "notes": engine.notes,
        }
    print(json.dumps(found))


def run(arguments: list[Any], limit: int | None) -> dict[str, Any]:
    """One child in a cgroup; its result with the peak charge."""
    with MemoryCgroup(f"moekit-uniform-{os.getpid()}") as group:
        if limit is not None:
            group.limit(limit)
        done = subprocess.run(
            [*group.wrap, sys.executable, __file__, "--child", *map(str, arguments)],
            capture_output=True,
            text=True,
        )
        peak = group.peak
    if done.returncode:
        raise SystemExit(f"{arguments} ended with {done.returncode}: {done.stderr[-1000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    seconds = found.pop("seconds")
    half = seconds[len(seconds) // 2 :]
    return {
        **found,
        "peak_charge": peak,
        "tokens": len(seconds),
        "first_token_seconds": seconds[0],
        "tokens_per_second": len(seconds) / sum(seconds),
        "full_tokens_per_second": len(half) / sum(half),
        "full_median_ms": 1000 * statistics.median(half),
        "ms": [round(1000 * s, 1) for s in seconds],
    }


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        packed, memory, tokens, seed = sys.argv[2:]
        child(packed, int(memory), int(tokens), int(seed))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="where the model is kept")
    parser.add_argument("--shape", default="r2")
    parser.add_argument("--limits", nargs="+", default=["14GB", "9GB"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 128], help="of each limit")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--result", type=Path, default=RESULT)
    given = parser.parse_args()
    packed = given.work / "int4"
    if not packed.exists():
        given.work.mkdir(parents=True, exist_ok=True)
        write_packed(given.shape, packed, CODEC, resident_codec=CODEC)
    names = ("shape", "limits", "tokens", "runs")
    options = {name: getattr(given, name) for name in names}
    options |= {"codec": CODEC, "threads": THREADS, "context": CONTEXT}
    record = start_record("benchmarks/run_uniform_routing.py", options, seed=0)
    rows = {}
    for name, tokens in zip(given.limits, given.tokens, strict=True):
        memory = bytes_of(name)
        runs = [
            run([packed, memory, tokens, seed], memory if seed else None)
            for seed in range(given.runs)
        ]
        if runs[0]["peak_charge"] > memory:
            raise SystemExit(f"the peak charge passed {name}: {runs[0]['peak_charge']}")
        rows[name] = runs
        for found in runs:
            print(
                f"{name}: {found['tokens_per_second']:.2f} tokens/s, with a full cache "
                f"{found['full_tokens_per_second']:.2f}; opened in {found['opening_seconds']:.1f} "
                f"s, {found['hit_rate']:.0%} found, peak {found['peak_charge'] / 1e9:.2f} GB",
                flush=True,
            )
    given.result.write_text(record.finish({"rows": rows}).to_json())


if __name__ == "__main__":
    main()
