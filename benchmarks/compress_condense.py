"""Merging and factorising babel's experts at 25, 50 and 75 %, three calibrations, beside pruning.

    python benchmarks/compress_condense.py --data DATA --work DIR [--seconds 100]

DATA is the folder that babel was trained on. Statistics are of DOMAIN.train.jsonl, documents drawn
by seed and kept in DIR; bits per byte of the leading bytes of DOMAIN.valid.jsonl. Interrupted, or
ended by --seconds, it goes on where it stopped. Writes benchmarks/results/compress_condense.json
when complete, or with --publish what there is.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from resumable import Done, OutOfTime

import moekit
from moekit.compress import Calibration, apply_live, rewrite_of, stats_for
from moekit.compress.condense.condense import condense_plan
from moekit.compress.condense.methods import recipe_of
from moekit.compress.condense.model_experts import ModelExperts
from moekit.compress.factorize.plan import FactorizeRequest, factorize_plan
from moekit.compress.prune.planning import prune
from moekit.compress.request import experts_per_layer
from moekit.core.load import local_directory
from moekit.core.plan import ExpertPlan
from moekit.core.record import start_record
from moekit.core.stats import ExpertStats
from moekit.evaluate.bits_per_byte import bits_per_byte
from moekit.evaluate.text import limit_bytes_per_domain, read_texts
from moekit.profile import align_weights

RESULT = Path(__file__).parent / "results" / "compress_condense.json"
SEEDS = (0, 1, 2)
RATIOS = (0.5, 0.25, 0.75)
SETS = ("default", "outputs", "inputs", "full", "fisher")
CALIBRATION, CONTEXT = 4_096, 512

# name: method, changes to its recipe. "mean" keeps one router row a merged expert.
MERGES: dict[str, tuple[str, dict[str, Any]]] = {
    "hc-smoe": ("hc-smoe", {}),
    "hc-smoe, mean router": ("hc-smoe", {"router": "mean"}),
    "m-smoe": ("m-smoe", {}),
    "m-smoe, not aligned": ("m-smoe", {"align": "none"}),
    "m-smoe, mean router": ("m-smoe", {"router": "mean"}),
    "dern": ("dern", {}),
    "uncurl": ("uncurl", {}),
    "sub-moe": ("sub-moe", {}),
    "reap-merge": ("reap-merge", {}),
    "fisher-merge": ("fisher-merge", {}),
    "zip-merge": ("zip-merge", {}),
    "hc-smoe, aligned": ("hc-smoe", {"align": "activations"}),
    "pleas": ("pleas", {}),
    "random-merge": ("random-merge", {}),
    "frequency-merge": ("frequency-merge", {}),
}
AT_HALF: dict[str, tuple[str, dict[str, Any]]] = {
    "hc-smoe, single linkage": ("hc-smoe", {"grouping_options": {"linkage": "single"}}),
    "hc-smoe, complete linkage": ("hc-smoe", {"grouping_options": {"linkage": "complete"}}),
    "mc-smoe": ("mc-smoe", {}),
}
PRUNERS = ("random", "frequency", "dern", "reap")
FACTORS = ("svd", "mole", "molae", "shared-basis")
WHITE = ("svd-white", "molae-white", "shared-basis-white")


@dataclass
class Bench:
    """babel, its texts, and what is measured with them."""

    data: Path
    work: Path
    model: str
    size: int

    def __post_init__(self) -> None:
        self.loaded = moekit.load(self.model, dtype="bfloat16")
        align_weights(self.loaded.model)
        self.view = moekit.MoEView(self.loaded.model)
        self.spec = self.loaded.spec
        self.experts = ModelExperts.of_view(self.view)
        self.directory = Path(local_directory(self.model))
        valid = read_texts(sorted(self.data.glob("*.valid.jsonl")))
        self.valid = limit_bytes_per_domain(valid, self.size)

    def stats(self, seed: int) -> ExpertStats:
        path = self.work / f"stats-{seed}"
        if not path.exists():
            texts = tuple(map(str, sorted(self.data.glob("*.train.jsonl"))))
            drawn = Calibration(data=texts, max_tokens=CALIBRATION, seed=seed)
            stats_for(self.loaded, drawn, SETS).save(path)
        return ExpertStats.open(path)

    def measure(self, plan: ExpertPlan, stats: ExpertStats | None = None) -> dict[str, Any]:
        """Bits per byte by domain under a plan."""
        with apply_live(self.view, plan, rewrite_of(plan, self.directory, stats)):
            found = bits_per_byte(
                self.loaded.model,
                self.loaded.tokenizer,
                self.valid,
                context=CONTEXT,
                stride=CONTEXT,
                batch_size=4,
            )
        tokens = sum(loss.tokens for loss in found.per_domain.values())
        losses = {name: loss.bpb for name, loss in found.per_domain.items()}
        return {"bpb": found.mean, "tokens": tokens, "by_domain": losses}

    def merged(self, name: str, ratio: float, seed: int) -> dict[str, Any]:
        method, changes = (MERGES | AT_HALF)[name]
        stats = self.stats(seed)
        keep = experts_per_layer(self.spec, ratio=ratio)
        recipe = recipe_of(method, **changes)
        plan = condense_plan(self.spec, stats, self.experts, keep, recipe, seed=seed)
        return self.measure(plan, stats)

    def pruned(self, score: str, ratio: float, seed: int) -> dict[str, Any]:
        options = {"seed": seed} if score == "random" else {}
        keep = experts_per_layer(self.spec, ratio=ratio)
        return self.measure(prune(self.spec, self.stats(seed), score, keep, **options))

    def factored(self, method: str, ratio: float, seed: int) -> dict[str, Any]:
        """None of the numbers where the method cannot save so much."""
        stats = self.stats(seed)
        try:
            plan = factorize_plan(self.spec, FactorizeRequest(method, ratio=ratio), stats=stats)
        except moekit.UserError:
            return {"bpb": None}
        ranks = [plan.action(layer.layer_index, 0).rank for layer in self.spec.per_layer]
        return {"rank": ranks[0], **self.measure(plan, stats)}


def cases(bench: Bench) -> Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]:
    """Every row of the result with what computes it; one ratio after the other."""
    for ratio in RATIOS:
        for seed in SEEDS:
            for kind, names, run in (
                ("prune", PRUNERS, bench.pruned),
                ("merge", tuple(MERGES), bench.merged),
                ("merge", tuple(AT_HALF) if ratio == 0.5 else (), bench.merged),
                # Without statistics nothing depends on the seed.
                ("factorize", FACTORS if seed == SEEDS[0] else (), bench.factored),
                ("factorize", WHITE, bench.factored),
            ):
                for name in names:
                    row = {"kind": kind, "method": name, "ratio": ratio, "seed": seed}
                    yield row, lambda a=(name, ratio, seed), run=run: run(*a)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="where statistics are kept")
    parser.add_argument("--model", default="babel")
    parser.add_argument("--bytes", type=int, default=1500, help="of each domain of valid")
    parser.add_argument("--seconds", type=float, help="stop after so many, to be called again")
    parser.add_argument("--publish", action="store_true", help="write what there is")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    arguments.work.mkdir(parents=True, exist_ok=True)
    options = {
        **{"model": arguments.model, "bytes": arguments.bytes, "context": CONTEXT},
        **{"calibration": CALIBRATION, "seeds": len(SEEDS)},
    }
    deadline = time.monotonic() + arguments.seconds if arguments.seconds else None
    done = Done(arguments.work / "compress_condense.partial.json", options, deadline)
    record = start_record("benchmarks/compress_condense.py", options, seed=0)
    bench = Bench(arguments.data, arguments.work, arguments.model, arguments.bytes)
    metrics: dict[str, Any] = {"full": done.of("full", lambda: bench.measure(ExpertPlan()))}
    metrics["rows"] = []
    try:
        for row, compute in cases(bench):
            found = done.of(" ".join(map(str, row.values())), compute)
            metrics["rows"].append({**row, **found})
        metrics["complete"] = True
    except OutOfTime:
        metrics["complete"] = False
        print(f"{len(done.found)} parts are done; call again to go on")
        if not arguments.publish:
            return
    record.finish(metrics)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(json.loads(record.to_json()), indent=1) + "\n")


if __name__ == "__main__":
    main()
