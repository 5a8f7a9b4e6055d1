"""Seconds and memory of every measure that needs only a trace, on a large synthetic trace.

    OMP_NUM_THREADS=1 python benchmarks/analyze_trace.py --work /tmp

writes a trace of one million tokens by 24 layers by top-8 of 64, opens it from disk, and runs
`analyze`'s measures one by one with their default settings. Its skew: token ids by Zipf's law; each
token id has 8 sets of experts a layer, drawn with preferences of standard deviation 1 that all
tokens share; a token keeps its neighbour's set number with probability 0.7, and the domain (8 of
them, samples of 512) shifts it. No result is written unless counts made in another way agree.
The result goes to `benchmarks/results/analyze_trace.json`; seconds are of one thread, bytes are the
whole process's anonymous memory at its peak, torch included.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moekit.analyze import analyze, measures, open_traces
from moekit.core.memory import PeakMemory, format_bytes
from moekit.core.record import start_record
from moekit.core.trace import RoutingTrace
from moekit.core.trace_files import (
    TraceHeader,
    TraceLayer,
    begin_directory,
    finish_directory,
    write_chunk,
    write_header,
)

EXPERTS, WIDTH, LAYERS, SAMPLE, CHUNK = 64, 8, 24, 512, 2**17
VOCAB, SETS, DOMAINS = 4096, 8, 8
# Measures of one trace that say something about any text; the rest need labels or probes.
SETTINGS: dict[str, dict[str, Any]] = {
    "language-divergence": {"reference": "d0"},
    "cognitive-experts": {"markers": [7]},
    "behaviour-audit": {"positive": "d1", "negative": "d2"},
}
RESULT = Path(__file__).parent / "results" / "analyze_trace.json"


def synthesise(out: Path, num_tokens: int, seed: int) -> list[np.ndarray]:
    """Write the trace; returns the choices of each layer by expert, counted from the tables."""
    rng = np.random.default_rng(seed)
    tokens = np.minimum(rng.zipf(1.2, num_tokens), VOCAB) - 1
    lengths = [min(SAMPLE, num_tokens - i) for i in range(0, num_tokens, SAMPLE)]
    domain = np.repeat(np.arange(len(lengths)) % DOMAINS, lengths)
    fresh = rng.random(num_tokens) > 0.7
    drawn = rng.integers(0, SETS // 2, num_tokens)
    held = drawn[np.maximum.accumulate(np.where(fresh, np.arange(num_tokens), 0))]
    row = tokens * SETS + (held + domain) % SETS
    used = np.bincount(row, minlength=VOCAB * SETS)
    header = TraceHeader(
        "synthetic",
        [TraceLayer(i, f"layers.{i}", EXPERTS, EXPERTS, WIDTH) for i in range(LAYERS)],
        lengths=lengths,
        sample_domains=[i % DOMAINS for i in range(len(lengths))],
        domains=[f"d{i}" for i in range(DOMAINS)],
    )
    tables, counts = [], []
    for _ in range(LAYERS):
        shared = rng.normal(size=EXPERTS)
        scores = rng.gumbel(size=(VOCAB * SETS, EXPERTS)).astype(np.float32) + shared
        table = np.argpartition(-scores, WIDTH, axis=1)[:, :WIDTH].astype(np.int8)
        tables.append(table)
        by_expert = np.zeros(EXPERTS, dtype=np.int64)
        for place in range(WIDTH):
            np.add.at(by_expert, table[:, place], used)
        counts.append(by_expert)
    directory = begin_directory(out)
    sizes = []
    for number, start in enumerate(range(0, num_tokens, CHUNK)):
        rows = row[start : start + CHUNK]
        tensors = {
            "tokens": torch.as_tensor(tokens[start : start + CHUNK], dtype=torch.int32),
            "phase": torch.zeros(len(rows), dtype=torch.uint8),
        }
        for layer, table in enumerate(tables):
            tensors[f"ids.{layer}"] = torch.from_numpy(table[rows])
            weights = rng.random((len(rows), WIDTH), dtype=np.float32)
            tensors[f"weights.{layer}"] = torch.from_numpy(weights).bfloat16()
        write_chunk(directory, number, tensors)
        sizes.append(len(rows))
    write_header(directory, header, sizes)
    finish_directory(directory, out)
    return counts


def time_measures(trace: RoutingTrace, expected: list[np.ndarray]) -> list[dict[str, Any]]:
    """Run every measure of one trace, checking the counts of the first."""
    rows = []
    chosen = [method for method in measures() if set(method.needs) == {"trace"}]
    for method in chosen:
        # Imports are not what is timed.
        method.load()
    for method in chosen:
        wall, cpu = time.perf_counter(), time.process_time()
        with PeakMemory() as peak:
            settings = {method.name: SETTINGS[method.name]} if method.name in SETTINGS else None
            result = analyze(trace, [method.name], settings=settings).results[method.name]
        rows.append(
            {
                "measure": method.name,
                "seconds": round(time.perf_counter() - wall, 2),
                "cpu_seconds": round(time.process_time() - cpu, 2),
                "peak_bytes": peak.peak,
                "tokens": result.summary.get("tokens", len(trace)),
            }
        )
        if method.name == "load":
            found = result.detail["counts"]
            if not all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True)):
                raise SystemExit("load counts other choices than the trace was made of")
        if method.name == "cache-curve":
            best = np.array(result.column("belady"))
            if any((np.array(result.column(p)) > best).any() for p in ("lru", "lfu", "lfu-aged")):
                raise SystemExit("a cache policy is above the optimum")
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--work", type=Path, default=Path("."))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--note", default="", help="what else ran on the machine")
    options = parser.parse_args()
    torch.set_num_threads(1)
    given = {"tokens": options.tokens, "seed": options.seed, "note": options.note}
    record = start_record("benchmarks/analyze_trace", given, seed=options.seed)
    path = options.work / "analyze_trace_benchmark"
    try:
        expected = synthesise(path, options.tokens, options.seed)
        size = sum(file.stat().st_size for file in path.iterdir())
        trace = open_traces([path])[0]
        with PeakMemory() as peak:
            rows = time_measures(trace, expected)
    finally:
        shutil.rmtree(path, ignore_errors=True)
        shutil.rmtree(path.with_name(path.name + ".partial"), ignore_errors=True)
    total = {
        "seconds": round(sum(row["seconds"] for row in rows), 1),
        "cpu_seconds": round(sum(row["cpu_seconds"] for row in rows), 1),
        "peak_bytes": peak.peak,
        "trace_bytes": size,
        "load_average": os.getloadavg()[0],
    }
    record.finish({"total": total, "measures": rows})
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(record.to_json(), encoding="utf-8")
    print(
        f"{total['seconds']} s, {total['cpu_seconds']} s of CPU, "
        f"peak {format_bytes(peak.peak)}; {options.out}"
    )


if __name__ == "__main__":
    main()
