"""How well predictors of experts do on babel, and what prefetch by them is worth.

    python benchmarks/predictors.py --data DATA

DATA is the folder that babel was trained on. Predictors learn from documents of DOMAIN.train.jsonl
and are measured on documents of DOMAIN.valid.jsonl, one sequence at a time. Recall, precision and
wasted reads are at budgets of K, 3/2 K and 2 K experts a layer, for predictions one to three layers
ahead, with nothing cached. Then the same text runs in virtual time, where computing a layer takes 1
and reading an expert as said, with a cache of some share of the experts: the time is over the least
that is possible, max(computing, reading what is missed without prefetch), and bytes are over those
without prefetch. Writes benchmarks/results/predictors.json.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch

import moekit
from moekit.core.cache_score import policy
from moekit.core.collect import collect, pad_batches
from moekit.core.record import start_record
from moekit.core.trace_writer import TraceWriter
from moekit.core.view import MoEView
from moekit.runtime.predict.files import make_predictor
from moekit.runtime.predict.gates import gates_of
from moekit.runtime.predict.measure import Quality, measure
from moekit.runtime.predict.predictor import Predictor
from moekit.runtime.predict.prefetch import Prefetcher
from moekit.runtime.predict.recorded import Recording, record
from moekit.runtime.predict.timeline import play
from moekit.train.data import read_domains

RESULT = Path(__file__).parent / "results" / "predictors.json"
PREDICTORS = {
    "random": {},
    "popularity": {},
    "premoe": {},
    "moe-infinity": {},
    "transitions": {},
    "edgemoe": {},
    "expertflow": {},
    "next-gate": {},
    "next-gate, no renorm": {"renorm": False},
}
PLAYED = ("edgemoe", "next-gate")
# Share of the experts in memory, and time of one read over the time of computing a layer.
PLAYS = ((0.6, 1.0), (0.6, 4.0), (0.35, 0.5), (0.35, 1.0), (0.2, 0.3))
POLICY = "lfu-aged"


def documents(
    texts: dict[str, list[str]], tokenizer: Any, count: int, length: int
) -> list[tuple[list[int], str]]:
    """The beginnings of documents spread over each domain; the first, on which constants of the
    prefetcher were chosen, is not among them."""
    samples = []
    for domain, own in sorted(texts.items()):
        for number in range(min(count, len(own))):
            text = own[(2 * number + 1) * len(own) // (2 * min(count, len(own)))]
            ids = tokenizer(text[: 6 * length], add_special_tokens=False)["input_ids"]
            samples.append(([tokenizer.eos_token_id, *ids[: length - 1]], domain))
    return samples


def row(quality: Quality) -> dict[str, Any]:
    return {
        "ahead": quality.ahead,
        "budgets": list(quality.budgets),
        "recall": quality.recall.tolist(),
        "precision": quality.precision.tolist(),
        "wasted": quality.wasted.tolist(),
        "chance": quality.chance.tolist(),
        "by_layer": quality.by_layer[quality.ahead :].tolist(),
    }


def in_time(predictors: dict[str, Predictor], recording: Recording) -> list[dict[str, Any]]:
    layers, rows = len(recording.ids), []
    for share, reading in PLAYS:
        slots = round(share * layers * recording.num_experts)
        setting = {
            "slots": slots,
            "score": policy(POLICY),
            "layer_seconds": 1.0,
            "read_seconds": reading,
        }
        plain = play(recording, None, **setting)
        least = max(plain.compute_seconds, plain.reads * reading)
        found = {}
        for name, predictor in predictors.items():
            ahead = Prefetcher(
                predictor,
                num_experts=recording.num_experts,
                top_k=recording.top_k,
                expert_bytes=[1] * layers,
                bandwidth=1 / reading,
                layer_seconds=1.0,
            )
            line = play(recording, ahead, **setting)
            found[name] = {
                "time": line.seconds / least,
                "bytes": line.reads / plain.reads,
                "demand_reads": line.demand_reads / plain.reads,
                "prefetch_reads": line.prefetch_reads,
            }
        rows.append(
            {
                "share": share,
                "read": reading,
                "hit_rate": 1 - plain.demand_reads / plain.accesses,
                "time": plain.seconds / least,
                "predictors": found,
            }
        )
        print(share, reading, rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="babel")
    parser.add_argument("--learned", type=int, default=12, help="documents a domain to learn from")
    parser.add_argument("--documents", type=int, default=2, help="documents a domain to measure on")
    parser.add_argument("--length", type=int, default=128, help="tokens of a document")
    arguments = parser.parse_args()
    options = {name: getattr(arguments, name) for name in ("learned", "documents", "length")}
    started = start_record("benchmarks/predictors.py", options, seed=0)
    loaded = moekit.load(arguments.model, dtype="float32")
    view = MoEView(loaded.model)
    tokenizer, length = loaded.tokenizer, arguments.length
    train = read_domains(arguments.data, "*.train.jsonl")
    valid = read_domains(arguments.data, "*.valid.jsonl")
    writer = TraceWriter()
    collect(view, pad_batches(documents(train, tokenizer, arguments.learned, length), 8), [writer])
    held = documents(valid, tokenizer, arguments.documents, length)
    recording = record(view, pad_batches(held, 8))
    gates = gates_of(view)
    quality, kept = {}, {}
    for name, own in PREDICTORS.items():
        begin = time.process_time()
        method = name.partition(",")[0]
        predictor = make_predictor(method, gates=gates, traces=[writer.trace], **own)
        fitted = time.process_time()
        found = measure(predictor, recording)
        seconds = time.process_time() - fitted
        quality[name] = {
            "fit_seconds": fitted - begin,
            "measure_seconds": seconds,
            "ahead": [row(entry) for entry in found],
        }
        if name in PLAYED:
            kept[name] = predictor
        print(name, [entry.recall.round(3).tolist() for entry in found], flush=True)
    started.finish(
        {
            "learned_tokens": len(writer.trace),
            "tokens": len(recording),
            "sequences": len(recording.starts),
            "layers": len(recording.ids),
            "num_experts": recording.num_experts,
            "top_k": recording.top_k,
            "policy": POLICY,
            "quality": quality,
            "in_time": in_time(kept, recording),
        }
    )
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(started.to_json())


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
