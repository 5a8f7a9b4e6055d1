"""`compress auto` on babel: its picks for five budgets beside the best single step and the truth.

    python benchmarks/compress_auto.py --data DATA [--seconds 1000]

DATA is the folder that babel was trained on (DOMAIN.train.jsonl and DOMAIN.valid.jsonl). The search
decides on documents of `train` (calibration and probe are different ones); every single step and
every pick is then measured on `valid`. Interrupted, or ended by --seconds, it goes on where it
stopped, and at the end writes benchmarks/results/compress_auto.json.
"""

import argparse
import time
from pathlib import Path
from typing import Any

from resumable import Done, OutOfTime

import moekit
from moekit.compress import Calibration, apply_live, stats_for
from moekit.compress.auto.problem import CompressionProblem
from moekit.compress.auto.search import Choice, Combination, search
from moekit.core.load import find_model
from moekit.core.packed import CodecChoice
from moekit.core.record import start_record
from moekit.evaluate.quality import measure_quality
from moekit.evaluate.text import Sample, limit_bytes_per_domain, read_texts, shuffled

RESULT = Path(__file__).parent / "results" / "compress_auto.json"
# Of the bytes of the unchanged model in 16 bits.
BUDGETS = (0.7, 0.5, 0.42, 0.36, 0.32)
CALIBRATION = 20_000
PROBE_BYTES, VALID_BYTES = 3_000, 8_000
PROBES = 24


class Remembered(CompressionProblem):
    """The problem with every loss kept in a file."""

    done: Done

    def increase(self, combination: Combination) -> float:
        key = "probe: " + " + ".join(map(str, combination))
        return float(self.done.of(key, lambda: super(Remembered, self).increase(combination)))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seconds", type=float)
    args = parser.parse_args()
    deadline = None if args.seconds is None else time.monotonic() + args.seconds
    identity = {"calibration": CALIBRATION, "probe": PROBE_BYTES, "valid": VALID_BYTES}
    done = Done(RESULT.with_suffix(".partial.json"), identity, deadline)
    record = start_record("benchmark compress_auto", {**identity, "probes": PROBES})
    try:
        metrics = measure(args.data, done)
    except OutOfTime:
        print("out of time; run again to go on")
        return
    record.finish(metrics)
    RESULT.write_text(record.to_json())
    done.path.unlink()


def measure(data: Path, done: Done) -> dict[str, Any]:
    loaded = moekit.load("babel")
    view = moekit.MoEView(loaded.model)
    train = tuple(str(path) for path in sorted(data.glob("*.train.jsonl")))
    valid = read_texts(sorted(data.glob("*.valid.jsonl")))
    valid = limit_bytes_per_domain(shuffled(valid, 0), VALID_BYTES)
    probe = limit_bytes_per_domain(shuffled(read_texts(train), 1_000_003), PROBE_BYTES)
    where = Calibration(data=train, max_tokens=CALIBRATION, seed=0)
    stats = stats_for(loaded, where, CompressionProblem.SETS)

    def loss_on(samples: list[Sample]) -> float:
        return measure_quality(loaded.model, loaded.tokenizer, samples).mean

    codec = CodecChoice("int4", 32)
    problem = Remembered(
        view, loaded.spec, stats, find_model("babel"), lambda: loss_on(probe), codec
    )
    problem.done = done
    choices = problem.choices()
    singles = [(choice,) for of_kind in choices.values() for choice in of_kind]
    whole = problem.size(())
    budgets = [round(share * whole) for share in BUDGETS]
    found = search(problem, choices, budgets, probes=len(singles) + 1 + PROBES)

    before = float(done.of("valid: unchanged", lambda: loss_on(valid)))

    def true_increase(combination: Combination) -> float:
        def measured() -> float:
            made = problem.made(combination)
            with apply_live(view, made.plan, made.rewrite, made.codec):
                return loss_on(valid)

        key = "valid: " + " + ".join(map(str, combination))
        return float(done.of(key, measured)) - before if combination else 0.0

    rows = []
    for budget, pick in found.picks.items():
        fitting = [single for single in singles if problem.size(single) <= budget]
        best = min(fitting, key=true_increase, default=None)
        rows.append(
            {
                "budget": budget,
                "share": budget / whole,
                "pick": str(pick),
                "bytes": pick.size,
                "forecast": pick.increase,
                "increase": true_increase(pick.combination),
                "single": None if best is None else label(best),
                "single_increase": None if best is None else true_increase(best),
            }
        )
    return {
        "unchanged_bytes": whole,
        "unchanged_bits_per_byte": before,
        "probes": len(found.probes),
        "combinations": len(choices["experts"]) * len(choices["bits"]),
        "budgets": rows,
        "front": [
            {
                "label": str(one),
                "bytes": one.size,
                "forecast": one.increase,
                "increase": true_increase(one.combination),
            }
            for one in found.front
        ],
        "singles": [
            {"label": label(one), "bytes": problem.size(one), "increase": true_increase(one)}
            for one in singles
        ],
    }


def label(combination: tuple[Choice, ...]) -> str:
    return " + ".join(map(str, combination))


if __name__ == "__main__":
    main()
