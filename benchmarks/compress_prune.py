"""Pruning babel: every score at 25, 50 and 75 %, searches, own domains, three calibrations.

    python benchmarks/compress_prune.py --data DATA [--seconds 100]

DATA is the folder that babel was trained on (DOMAIN.train.jsonl and DOMAIN.valid.jsonl). Scores are
taken on `train`, bits per byte on `valid`, each with its own documents drawn by seed. Interrupted,
or ended by --seconds, it goes on where it stopped (benchmarks/results/compress_prune.partial.json)
and at the end writes benchmarks/results/compress_prune.json.
"""

import argparse
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from resumable import Done, OutOfTime

import moekit
from moekit.compress.live import apply_live
from moekit.compress.prune.evolution import eep, loss_points
from moekit.compress.prune.genome import MixedExperts, genome_plan
from moekit.compress.prune.library import TaskLibrary
from moekit.compress.prune.naee import naee
from moekit.compress.prune.planning import plan_of, prune, rooms_of
from moekit.compress.prune.select import Room
from moekit.compress.request import experts_per_layer
from moekit.core.collect import Batch, pad_batches
from moekit.core.plan import ExpertPlan
from moekit.core.record import start_record
from moekit.core.stats import ExpertStats
from moekit.evaluate.bits_per_byte import bits_per_byte
from moekit.evaluate.text import Sample, limit_bytes_per_domain, read_texts, shuffled
from moekit.profile import align_weights, profile

RESULT = Path(__file__).parent / "results" / "compress_prune.json"
PARTIAL = RESULT.with_suffix(".partial.json")
SEEDS = (0, 1, 2)
CLAIMED = 0.5
RATIOS = (0.25, 0.75)
SCORES = (
    *("random", "frequency", "gate-mass", "ean", "gated-ean", "reap", "man", "msan"),
    *("easy-ep", "tcess", "max-activation"),
)
OWN_DOMAIN = ("random", "frequency", "gate-mass", "reap", "man", "easy-ep", "tcess")
GLOBAL = ("frequency", "reap")
CONTEXT = 512
# Tokens of a calibration, all domains together, and of the searches' inner objective.
CALIBRATION, SEARCH = 30_000, 1_536
EVALUATIONS = {"naee": 400, "eep": 60}


class Bench:
    """babel, its texts, and what is measured with them."""

    def __init__(self, data: Path, model: str, size: int) -> None:
        self.loaded = moekit.load(model, dtype="float32")
        align_weights(self.loaded.model)
        self.view = moekit.MoEView(self.loaded.model)
        self.spec = self.loaded.spec
        valid = read_texts(sorted(data.glob("*.valid.jsonl")))
        self.valid = limit_bytes_per_domain(valid, size)
        self.domains = list(dict.fromkeys(sample.domain for sample in self.valid))
        self.train = read_texts(sorted(data.glob("*.train.jsonl")))
        self._stats: dict[int, ExpertStats] = {}

    def batches(self, seed: int, max_tokens: int) -> list[Batch]:
        """Text of `train` by seed, an equal share of tokens from each domain."""
        left = dict.fromkeys(self.domains, max_tokens // len(self.domains))
        sequences = []
        for sample in shuffled(self.train, seed):
            if left[sample.domain] <= 0:
                continue
            # No document is read further than the tokens that are wanted of it.
            text = sample.text[: 8 * left[sample.domain]]
            ids = self.loaded.tokenizer(text, verbose=False)["input_ids"][: left[sample.domain]]
            left[sample.domain] -= len(ids)
            sequences += [
                (ids[start : start + CONTEXT], sample.domain)
                for start in range(0, len(ids), CONTEXT)
            ]
        return list(pad_batches(sorted(sequences, key=lambda s: -len(s[0])), 8))

    def stats(self, seed: int) -> ExpertStats:
        if seed not in self._stats:
            self._stats[seed] = profile(self.view, self.batches(seed, CALIBRATION))
        return self._stats[seed]

    def rooms(self, ratio: float) -> list[Room]:
        return rooms_of(self.spec, experts_per_layer(self.spec, ratio=ratio))

    def measure(self, plan: ExpertPlan | None, samples: list[Sample] | None = None) -> Any:
        """Bits per byte by domain under a plan."""
        plan = plan or ExpertPlan()
        with apply_live(self.view, plan, MixedExperts(plan) if plan.fit else None):
            found = bits_per_byte(
                self.loaded.model,
                self.loaded.tokenizer,
                samples or self.valid,
                context=CONTEXT,
                stride=CONTEXT,
                batch_size=2,
            )
        return {name: loss.bpb for name, loss in found.per_domain.items()}

    def score(self, method: str, ratio: float, seed: int, **options: Any) -> ExpertPlan:
        if method == "random":
            options["seed"] = seed
        keep = experts_per_layer(self.spec, ratio=ratio)
        return prune(self.spec, self.stats(seed), method, keep, **options)

    def own_domain(self, method: str, ratio: float, seed: int) -> dict[str, float]:
        """Every domain under the plan that its own part of the calibration gives."""
        found = {}
        for domain in self.domains:
            plan = self.score(method, ratio, seed, domain=domain)
            samples = [sample for sample in self.valid if sample.domain == domain]
            found |= self.measure(plan, samples)
        return found

    def retrieval(self, seed: int) -> dict[str, Any]:
        """Which task each domain's validation text finds, and its loss with half of the experts."""
        library, rooms = TaskLibrary.of(self.stats(seed)), self.rooms(0.5)
        tasks, losses = {}, {}
        for domain in self.domains:
            samples = [sample for sample in self.valid if sample.domain == domain]
            ids = self.loaded.tokenizer(samples[0].text)["input_ids"][:CONTEXT]
            key = library.key_of(self.view, [torch.tensor([ids])])
            tasks[domain] = library.nearest(key)[0][0]
            keep = library.keep(tasks[domain], rooms)
            losses |= self.measure(plan_of(self.spec, rooms, keep, "premoe"), samples)
        return {"tasks": tasks, "by_domain": losses}

    def naee(self, ratio: float, seed: int) -> dict[str, Any]:
        start, rooms = time.monotonic(), self.rooms(ratio)
        found = naee(
            self.view,
            self.batches(seed, SEARCH),
            rooms,
            how="descent",
            max_evaluations=EVALUATIONS["naee"],
        )
        seconds = time.monotonic() - start
        losses = self.measure(plan_of(self.spec, rooms, found.keep, "naee"))
        return {"evaluations": found.evaluations, "seconds": seconds, "by_domain": losses}

    def eep(self, ratio: float, seed: int) -> dict[str, Any]:
        start, rooms = time.monotonic(), self.rooms(ratio)
        first = self.score("reap", ratio, seed)
        keep = [
            first.survivors(layer.layer_index, layer.num_experts) for layer in self.spec.per_layer
        ]
        found = eep(
            rooms,
            loss_points(self.view, rooms, self.batches(seed, SEARCH)),
            initial=10,
            pruning=30,
            total=EVALUATIONS["eep"],
            start=[keep],
            seed=seed,
        )
        plan = genome_plan(self.spec, rooms, found.best)
        return {
            "evaluations": found.evaluations,
            "seconds": time.monotonic() - start,
            "mixes": plan.fit is not None,
            "fitness": [found.history[0], found.history[29], found.history[-1]],
            "by_domain": self.measure(plan),
        }


def work(bench: Bench, done: Done, write: bool) -> dict[str, Any]:
    """Everything, or with `write` what is there; raises OutOfTime when the time is over."""
    metrics: dict[str, Any] = {"full": done.of("full", lambda: bench.measure(None))}
    for name in ("scores", "own_domain", "global", "naee", "eep", "retrieval"):
        metrics[name] = []

    def add(name: str, label: dict[str, Any], compute: Callable[[], Any]) -> None:
        key = " ".join([name, *map(str, label.values())])
        if key in done.found or not write:
            metrics[name].append({**label, **done.of(key, compute)})

    def scored(ratio: float, seed: int) -> None:
        for method in SCORES:
            plan = functools.partial(bench.score, method, ratio, seed)
            label = {"method": method, "ratio": ratio, "seed": seed}
            add("scores", label, lambda p=plan: {"by_domain": bench.measure(p())})

    # What the papers' claims are checked with comes first.
    for seed in SEEDS:
        scored(CLAIMED, seed)
        add("retrieval", {"seed": seed}, lambda s=seed: bench.retrieval(s))
        for method in OWN_DOMAIN:
            label = {"method": method, "ratio": CLAIMED, "seed": seed}
            own = functools.partial(bench.own_domain, method, CLAIMED, seed)
            add("own_domain", label, lambda o=own: {"by_domain": o()})
    for seed in SEEDS:
        label = {"ratio": CLAIMED, "seed": seed}
        add("eep", label, lambda s=seed: bench.eep(CLAIMED, s))
        add("naee", label, lambda s=seed: bench.naee(CLAIMED, s))
        for method in GLOBAL:
            plan = functools.partial(bench.score, method, CLAIMED, seed, scope="global")
            add(
                "global",
                {"method": method, **label},
                lambda p=plan: {"by_domain": bench.measure(p())},
            )
    for seed in SEEDS:
        for ratio in RATIOS:
            scored(ratio, seed)
    return metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="babel")
    parser.add_argument("--bytes", type=int, default=3000, help="of each domain of valid")
    parser.add_argument("--seconds", type=float, help="stop after so many, to be called again")
    parser.add_argument("--write", action="store_true", help="write the results there are")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    options = {
        **{"model": arguments.model, "bytes": arguments.bytes, "context": CONTEXT},
        **{"calibration": CALIBRATION, "search": SEARCH, "seeds": len(SEEDS)},
        "evaluations": EVALUATIONS,
    }
    deadline = time.monotonic() + arguments.seconds if arguments.seconds else None
    done = Done(PARTIAL, options, deadline)
    record = start_record("benchmarks/compress_prune.py", options, seed=0)
    bench = Bench(arguments.data, arguments.model, arguments.bytes)
    try:
        record.finish(work(bench, done, arguments.write))
    except OutOfTime:
        print(f"{len(done.found)} parts are done; call again to go on")
        return
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(record.to_json())
    if not arguments.write:
        PARTIAL.unlink()


if __name__ == "__main__":
    main()
