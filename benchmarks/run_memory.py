"""Peak memory of `open_engine` under limits, in a memory cgroup: page cache and kernel included.

    python benchmarks/run_memory.py --work DIR

DIR keeps a packed model of the reference shape R1 (0.8 GB, made by the first run). Each setting
runs in a process of its own that reads a prompt and decodes: once in a cgroup without a limit,
whose peak charge must stay within the sum that the engine prints, and once with the cgroup's limit
set to that sum, where it must finish. Needs root, for the cgroups. Writes
benchmarks/results/run_memory.json; nothing is written where a limit was passed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from memory_cgroup import MemoryCgroup
from reference_shapes import write_packed

from moekit.core.record import start_record
from moekit.runtime.store import ExpertStore

RESULT = Path(__file__).parent / "results" / "run_memory.json"
PROMPT, NEW, CONTEXT = 300, 40, 1024
# Share of the experts in memory, runner, streams.
SETTINGS = (
    (0.2, "native", 1),
    (0.5, "native", 4),
    (1.0, "native", 1),
    (0.2, "graph", 1),
    (0.5, "graph", 2),
)


def child(packed: str, cache: int, memory: int, runner: str, streams: int) -> None:
    """Open, generate, and print what was planned and done."""
    import torch

    import moekit

    generator = torch.Generator().manual_seed(0)
    with moekit.open_engine(
        packed,
        memory or None,
        expert_cache=cache,
        runner=runner,
        streams=streams,
        max_context=CONTEXT,
    ) as engine:
        assert engine.budget is not None
        vocabulary = engine.config.vocab_size
        prompts = torch.randint(0, vocabulary, (streams, PROMPT), generator=generator)
        engine.generate(prompts, NEW)
        stats = engine.stats
        found = {
            "memory": engine.budget.to_dict(),
            "limit": engine.budget.limit,
            "hit_rate": stats.hit_rate,
            "ms_per_token": stats.ms_per_token,
        }
    print(json.dumps(found))


def run(arguments: list[Any], limit: int | None) -> dict[str, Any]:
    """One child in a cgroup; its result with the peak charge."""
    with MemoryCgroup(f"moekit-memory-{os.getpid()}") as group:
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
    return {**json.loads(done.stdout.splitlines()[-1]), "peak_charge": peak}


def measure(packed: Path, everything: int) -> list[dict[str, Any]]:
    rows = []
    for share, runner, streams in SETTINGS:
        cache = int(share * everything)
        free = run([packed, cache, 0, runner, streams], None)
        bound = run([packed, cache, free["limit"], runner, streams], free["limit"])
        row = {"share": share, "runner": runner, "streams": streams}
        rows.append({**row, "without_limit": free, "with_limit": bound})
        print(
            f"{share:.0%} {runner} x{streams}: peak {free['peak_charge'] / 1e6:.0f} MB of "
            f"{free['limit'] / 1e6:.0f} MB; limited: {bound['ms_per_token']:.1f} ms a token",
            flush=True,
        )
    return rows


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        packed, cache, memory, runner, streams = sys.argv[2:]
        child(packed, int(cache), int(memory), runner, int(streams))
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, required=True)
    work = parser.parse_args().work
    packed = work / "r1-int4"
    if not packed.exists():
        work.mkdir(parents=True, exist_ok=True)
        write_packed("r1", packed, "int4")
    record = start_record("benchmarks/run_memory.py", {"context": CONTEXT}, seed=0)
    with ExpertStore.open(packed) as store:
        everything = store.expert_bytes
    rows = measure(packed, everything)
    over = [
        row for row in rows if row["without_limit"]["peak_charge"] > row["without_limit"]["limit"]
    ]
    if over:
        raise SystemExit(f"the peak charge passed the limit: {over}")
    RESULT.write_text(record.finish({"expert_bytes": everything, "rows": rows}).to_json())


if __name__ == "__main__":
    main()
