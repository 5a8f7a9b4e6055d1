"""How good babel is: bits per byte beside its dense twin and xz, and what its routing knows.

    python benchmarks/babel_quality.py --data DATA --dense RUNS/babel-dense

DATA is the folder that babel was trained on (DOMAIN.train.jsonl and DOMAIN.valid.jsonl). Writes
benchmarks/results/babel_quality.json; `python benchmarks/render.py` turns it into docs/results.md.
"""

import argparse
import json
import lzma
import math
import tempfile
from pathlib import Path
from typing import Any

import torch

import moekit
from moekit.analyze.specialisation import specialisation
from moekit.core.checkpoint import Checkpoint
from moekit.core.collect import collect, pad_batches
from moekit.core.load import resolve_model
from moekit.core.record import start_record
from moekit.core.trace import RoutingTrace
from moekit.core.trace_writer import TraceWriter
from moekit.evaluate.text import Sample
from moekit.train.data import read_domains

RESULT = Path(__file__).parent / "results" / "babel_quality.json"
CONTEXT = 512
PERMUTATIONS = 200


def xz_bits_per_byte(train: list[str], valid: list[str]) -> float:
    """What xz -9 adds for the validation text when it has just seen the training text."""
    before = "\n".join(train).encode()
    both = before + "\n".join(valid).encode()
    added = len(lzma.compress(both, preset=9)) - len(lzma.compress(before, preset=9))
    return 8 * added / len("\n".join(valid).encode())


def score(source: str) -> dict[str, Any]:
    """What `moekit train` measured on the whole validation text when the run ended."""
    directory = Path(resolve_model(source))
    found = json.loads((directory / "training" / "evaluation.json").read_text())
    checkpoint = Checkpoint(directory)
    shapes = (checkpoint.shape(name) for name in checkpoint)
    return {"parameters": sum(math.prod(shape) for shape in shapes), **found}


def routing(source: str, samples: list[Sample], bytes_per_domain: int) -> dict[str, Any]:
    """Mutual information of domain and expert by layer, and its value under shuffled labels."""
    loaded = moekit.load(source)
    end = loaded.tokenizer.eos_token_id
    cut, used = [], {}
    for sample in samples:
        if used.get(sample.domain, 0) < bytes_per_domain:
            ids = loaded.tokenizer(sample.text, add_special_tokens=False)["input_ids"]
            cut += [
                ([end, *ids[start : start + CONTEXT - 1]], sample.domain)
                for start in range(0, len(ids), CONTEXT - 1)
            ]
            used[sample.domain] = used.get(sample.domain, 0) + len(sample.text.encode())
    with tempfile.TemporaryDirectory() as folder:
        writer = TraceWriter(Path(folder) / "trace")
        collect(moekit.MoEView(loaded.model), pad_batches(cut, 8, pad_id=end), [writer])
        trace = RoutingTrace.open(Path(folder) / "trace")
        found = specialisation(trace, permutations=PERMUTATIONS)
        dead = [_unused(trace, position) for position in range(len(trace.layers))]
        layers = [
            {"bits": row[1], "chance": row[2], "p": row[3], "specialists": row[4]}
            for row in found.rows
        ]
        return {
            **{"tokens": len(trace), "sequences": len(trace.samples)},
            **{"permutations": PERMUTATIONS, "dead_experts": dead, "layers": layers},
        }


def _unused(trace: RoutingTrace, position: int) -> int:
    """How many experts of a layer no token of the trace reached."""
    return trace.layers[position].num_experts - len(trace.layer(position).topk_ids.unique())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="babel")
    parser.add_argument("--dense", required=True)
    parser.add_argument("--bytes", type=int, default=12_000, help="traced bytes a domain")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    train = read_domains(arguments.data, "*.train.jsonl")
    valid = read_domains(arguments.data, "*.valid.jsonl")
    samples = [Sample(text, name) for name, texts in sorted(valid.items()) for text in texts]
    options = {"bytes": arguments.bytes, "context": CONTEXT, "stride": CONTEXT // 2}
    record = start_record("benchmarks/babel_quality.py", options, seed=0)
    xz = {name: xz_bits_per_byte(train[name], valid[name]) for name in sorted(valid)}
    record.finish(
        {
            "babel": score(arguments.model),
            "dense": score(arguments.dense),
            "xz": {"mean": sum(xz.values()) / len(xz), "by_domain": xz},
            "routing": routing(arguments.model, samples, arguments.bytes),
        }
    )
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(record.to_json())


if __name__ == "__main__":
    main()
