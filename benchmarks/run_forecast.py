"""Forecast of `moekit run --dry-run --trace` beside measured decoding, on five settings.

    python benchmarks/run_forecast.py --data DATA --work DIR

DATA is the folder that babel was trained on; DIR keeps widened babel, packed (0.7 GB, made by the
first run). The forecast's hit rate comes from replaying the routing of training documents, the
measurement decodes validation documents token by token; the first of them fill the expert cache.
Every setting is forecast and measured some times, and the fastest time counts. Run on an idle
machine. Writes benchmarks/results/run_forecast.json.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

from widen import widen

import moekit
from moekit.core.collect import pad_batches
from moekit.core.load import load_tokenizer, resolve_model
from moekit.core.pack import pack
from moekit.core.record import start_record
from moekit.core.trace_writer import TraceWriter
from moekit.runtime.forecast_decode import plan_decode
from moekit.runtime.store import ExpertStore
from moekit.train.data import read_domains

RESULT = Path(__file__).parent / "results" / "run_forecast.json"
# Runner and share of the experts in memory.
SETTINGS = (("native", 1.0), ("native", 0.6), ("native", 0.35), ("native", 0.2), ("graph", 0.35))
CONTEXT, LENGTH = 512, 64
# Documents that fill the cache, and that are measured.
FILL, MEASURED = 3, 4


def documents(data: Path, which: str, count: int) -> list[list[int]]:
    """The beginnings of one document of each of some domains, as token ids."""
    tokenizer = load_tokenizer(Path(resolve_model("babel")))
    found = []
    for _, texts in sorted(read_domains(data, f"*.{which}.jsonl").items()):
        for text in texts:
            ids = tokenizer(text[: 8 * LENGTH], add_special_tokens=False)["input_ids"]
            if len(ids) >= LENGTH:
                found.append([tokenizer.eos_token_id, *ids[: LENGTH - 1]])
                break
    return found[:: max(1, len(found) // count)][:count]


def prepare(work: Path, data: Path, width: int) -> tuple[Path, Path]:
    """The packed model, and a trace of babel, whose routing is the same."""
    packed, wide, trace = work / f"int4-{width}", work / "wide", work / "trace"
    work.mkdir(parents=True, exist_ok=True)
    if not packed.exists():
        widen("babel", wide, width, overwrite=True)
        pack(wide, packed, codec="int4")
        shutil.rmtree(wide)
    if not trace.exists():
        loaded = moekit.load("babel")
        writer = TraceWriter()
        samples = [(ids, "train") for ids in documents(data, "train", 15)]
        moekit.collect(moekit.MoEView(loaded.model), pad_batches(samples, 8), [writer])
        writer.trace.save(trace)
    return packed, trace


def decode(engine: moekit.Engine, texts: list[list[int]]) -> float:
    """Seconds for all tokens of these texts, one after the other."""
    start = time.perf_counter()
    for ids in texts:
        sequence = engine.runner.new_sequence(CONTEXT)
        for token in ids:
            engine.runner.forward([sequence], [[token]])
        engine.runner.drop(sequence)
    return time.perf_counter() - start


def measure(
    packed: Path, trace: Path, texts: list[list[int]], runner: str, share: float, threads: int
) -> dict[str, Any]:
    with ExpertStore.open(packed) as store:
        cache = int(share * store.expert_bytes)
    plan = plan_decode(packed, expert_cache=cache, runner=runner, threads=threads, trace=trace)
    options = {"expert_cache": cache, "runner": runner, "max_context": CONTEXT, "streams": 1}
    with moekit.open_engine(packed, threads=threads, **options) as engine:
        assert engine.cache is not None
        if plan.budget.complete:
            engine.cache.load_all()
        decode(engine, texts[:FILL])
        before = engine.cache.stats.hits, engine.cache.stats.misses
        seconds = decode(engine, texts[FILL:])
        hits = engine.cache.stats.hits - before[0]
        misses = engine.cache.stats.misses - before[1]
        notes = engine.notes
    measured = MEASURED * LENGTH / seconds
    return {
        "runner": runner,
        "share": share,
        "measured": measured,
        "hit_rate": hits / (hits + misses) if misses else 1.0,
        "expected_hit_rate": plan.hit_rate,
        "forecast": plan.forecast.tokens_per_second,
        "ratio": plan.forecast.tokens_per_second / measured,
        "plan": plan.to_dict(),
        "notes": notes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--width", type=int, default=8192, help="neurons of a widened expert")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5, help="the middle one counts")
    given = parser.parse_args()
    packed, trace = prepare(given.work, given.data, given.width)
    texts = documents(given.data, "valid", FILL + MEASURED)
    options = {"threads": given.threads, "width": given.width, "repeats": given.repeats}
    record = start_record("benchmarks/run_forecast.py", options, seed=0)
    rows = []
    for runner, share in SETTINGS:
        tries = [
            measure(packed, trace, texts, runner, share, given.threads)
            for _ in range(given.repeats)
        ]
        # The speed of this machine's memory changes within seconds, up and down.
        tries.sort(key=lambda row: row["ratio"])
        row = tries[len(tries) // 2]
        rows.append({**row, "ratios": [each["ratio"] for each in tries]})
        print(
            f"{runner} {share:.0%}: measured {row['measured']:.1f}, forecast {row['forecast']:.1f} "
            f"tokens/s ({row['ratio']:.2f}), {row['hit_rate']:.0%} in memory, expected "
            f"{row['expected_hit_rate']:.0%}",
            flush=True,
        )
    RESULT.write_text(record.finish({"rows": rows}).to_json())


if __name__ == "__main__":
    main()
