"""Skipping experts at run time on babel: what it costs in quality and what it saves in time.

    python benchmarks/dynamic_pruning.py quality --data DATA
    python benchmarks/dynamic_pruning.py speed --data DATA

DATA is the folder that babel was trained on. `quality` trains the networks of OTP and measures bits
per byte on `valid` under every rule; `speed` times prefill and decode under the same rules. Each
writes its part of benchmarks/results/dynamic_pruning.json.
"""

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import moekit
from moekit.compress.prune.learned_skipping import LearnedSkipping, train_skipping
from moekit.compress.prune.skipping import (
    Rule,
    Skipped,
    WeightRatio,
    odp,
    skipping,
    skipping_errors,
    thresholds,
)
from moekit.core.collect import Batch, pad_batches
from moekit.core.layer import MoELayer
from moekit.core.record import RunRecord, start_record
from moekit.core.routing_rule import Routing
from moekit.core.stats import ExpertStats
from moekit.evaluate.bits_per_byte import bits_per_byte
from moekit.evaluate.text import Sample, limit_bytes_per_domain, read_texts, shuffled
from moekit.profile import align_weights, profile

RESULT = Path(__file__).parent / "results" / "dynamic_pruning.json"
NETWORKS = RESULT.parent.parent.parent / "runs" / "otp"
QUANTILES = (0.25, 0.5, 0.75)
KEEP = (0.75, 0.5)
CONTEXT, CALIBRATION = 512, 12_000
TRAIN_LENGTH, STEPS = 128, 80
PREFILL, CACHED, REPEATS = (4, 512), 128, 5


class Chance:
    """Keeps a share of the choices whatever they weigh, the first of every token among them."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._noise = torch.Generator().manual_seed(0)

    def keep(self, layer: MoELayer, routing: Routing, hidden: Tensor) -> Tensor:
        top_k = routing.ids.shape[1]
        others = (self._share * top_k - 1) / (top_k - 1)
        kept = torch.rand(routing.ids.shape, generator=self._noise) < others
        return kept | (routing.weights == routing.weights.max(-1, keepdim=True).values)


def sequences(loaded: Any, samples: list[Sample], length: int, tokens: int) -> list[Batch]:
    """Samples cut to `length`, an equal share of `tokens` from each domain, in batches of 4."""
    domains = {sample.domain for sample in samples}
    left = dict.fromkeys(domains, tokens // len(domains))
    found = []
    for sample in shuffled(samples, 0):
        if left[sample.domain] < length:
            continue
        ids = loaded.tokenizer(sample.text[: 8 * length], verbose=False)["input_ids"][:length]
        left[sample.domain] -= len(ids)
        found.append((ids, sample.domain))
    return list(pad_batches(found, 4))


def rules(
    view: moekit.MoEView, stats: ExpertStats, networks: dict[float, LearnedSkipping]
) -> Iterator[tuple[str, Callable[[], AbstractContextManager[Any]]]]:
    """Names and contexts, the whole model first."""
    yield "none", nullcontext

    def ruled(rule: Rule) -> Callable[[], AbstractContextManager[Skipped]]:
        return lambda: skipping(view, rule)

    for quantile in QUANTILES:
        yield f"naee {quantile}", ruled(WeightRatio(thresholds(stats, quantile)))
    yield "odp 0.5", lambda: odp(view, stats, quantile=0.5)
    yield "odp 0.5, norm", lambda: odp(view, stats, quantile=0.5, importance="norm")
    for keep, rule in networks.items():
        yield f"otp {keep}", ruled(rule)
    for share in KEEP:
        yield f"chance {share}", ruled(Chance(share))
    yield "first only", ruled(WeightRatio(dict.fromkeys(range(len(view)), 1.1)))


def quality(loaded: Any, view: moekit.MoEView, data: Path, size: int) -> dict[str, Any]:
    train = read_texts(sorted(data.glob("*.train.jsonl")))
    valid = limit_bytes_per_domain(read_texts(sorted(data.glob("*.valid.jsonl"))), size)
    stats = profile(view, sequences(loaded, train, CONTEXT, CALIBRATION))
    shutil.rmtree(NETWORKS / "stats", ignore_errors=True)
    stats.save(NETWORKS / "stats")
    text = sequences(loaded, train, TRAIN_LENGTH, 4 * TRAIN_LENGTH * STEPS)
    networks, training = {}, {}
    for keep in KEEP:
        start = time.monotonic()
        networks[keep] = train_skipping(view, text, keep=keep, steps=STEPS)
        training[str(keep)] = time.monotonic() - start
        networks[keep].save(NETWORKS / f"{keep}.safetensors")
    rows = []
    for name, context in rules(view, stats, networks):
        with context() as skipped:
            found = bits_per_byte(
                loaded.model, loaded.tokenizer, valid, context=CONTEXT, stride=CONTEXT, batch_size=4
            )
        share = skipped.share if skipped else 0.0
        rows.append({"rule": name, "skipped": share, "mean": found.mean})
        print(rows[-1], flush=True)
    errors = skipping_errors(view, text[:4], WeightRatio(thresholds(stats, 0.5)))
    return {"rules": rows, "training_seconds": training, "layer_errors": errors}


@torch.no_grad()
def speed(loaded: Any, view: moekit.MoEView) -> list[dict[str, Any]]:
    """Median milliseconds of one thread's processor time, rules in turn.

    Processor time, so that other programs on the machine count little.
    """
    stats = ExpertStats.open(NETWORKS / "stats")
    networks = {k: LearnedSkipping.load(view, NETWORKS / f"{k}.safetensors") for k in KEEP}
    text = loaded.tokenizer(Path(__file__).read_text() * 4, return_tensors="pt")["input_ids"]
    ids = text[:, : PREFILL[0] * PREFILL[1]].view(*PREFILL)
    times: dict[str, dict[str, list[float]]] = {}
    for turn in range(REPEATS + 1):
        for name, context in rules(view, stats, networks):
            with context():
                start = time.process_time()
                loaded.model(ids, use_cache=False, logits_to_keep=1)
                prefill = time.process_time() - start
                cache = loaded.model(ids[:1, :CACHED], use_cache=True).past_key_values
                start = time.process_time()
                for position in range(CACHED, CACHED + 8):
                    loaded.model(ids[:1, position : position + 1], past_key_values=cache)
                decode = (time.process_time() - start) / 8
            if turn:
                # The first turn warms everything up.
                kept = times.setdefault(name, {"prefill": [], "decode": []})
                kept["prefill"].append(1000 * prefill)
                kept["decode"].append(1000 * decode)
    return [
        {"rule": name, **{key: statistics.median(values) for key, values in kept.items()}}
        for name, kept in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("quality", "speed"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="babel")
    parser.add_argument("--bytes", type=int, default=1000, help="of each domain of valid")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    options = {
        **{"model": arguments.model, "bytes": arguments.bytes, "context": CONTEXT},
        **{"calibration": CALIBRATION, "steps": STEPS, "length": TRAIN_LENGTH},
        **{"prefill": list(PREFILL), "repeats": REPEATS},
    }
    NETWORKS.mkdir(parents=True, exist_ok=True)
    loaded = moekit.load(arguments.model, dtype="float32")
    align_weights(loaded.model)
    view = moekit.MoEView(loaded.model)
    record = start_record("benchmarks/dynamic_pruning.py", options, seed=0)
    earlier = RunRecord.load(RESULT).metrics if RESULT.exists() else {}
    part = (
        quality(loaded, view, arguments.data, arguments.bytes)
        if arguments.part == "quality"
        else {"times": speed(loaded, view)}
    )
    record.finish({**earlier, arguments.part: part})
    RESULT.write_text(record.to_json())
    print(json.dumps(part))


if __name__ == "__main__":
    main()
