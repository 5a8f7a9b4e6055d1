"""Pruned and condensed babel as GGUF in llama.cpp, beside transformers in fp32, on real text.

    python benchmarks/compress_gguf.py --data DATA --peer-python PEER/bin/python --work DIR

DATA is the folder that babel was trained on (DOMAIN.valid.jsonl; DOMAIN.train.jsonl calibrates).
PEER is an environment with llama-cpp-python. The plans are those of `moekit compress` at its
defaults; the GGUF files are written from babel by the plan, the yardstick is the fused checkpoint
that the same plan makes. Writes benchmarks/results/compress_gguf.json; fails where f16 is beyond
the limits.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from gguf_llama_cpp import AGREEMENT, PERPLEXITY, TYPES, compare, own_scores, windows

from moekit.core.convert import convert
from moekit.core.load import load_tokenizer, resolve_model
from moekit.core.plan import ExpertPlan
from moekit.core.record import start_record
from moekit.export.gguf import convert_gguf

RESULT = Path(__file__).parent / "results" / "compress_gguf.json"
VERBS = ("prune", "condense")
RATIO, TOKENS = "0.25", "40000"


def plan_of(verb: str, data: Path, work: Path) -> ExpertPlan:
    """The plan of a verb at its defaults, from a sample of the training text."""
    texts = [part for file in sorted(data.glob("*.train.jsonl")) for part in ("--data", str(file))]
    out = work / f"{verb}.json"
    command = [sys.executable, "-m", "moekit", "compress", verb, "babel", *texts]
    command += ["--max-tokens", TOKENS, "--ratio", RATIO, "--plan-only", str(out)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return ExpertPlan.load(out)


def measure(
    model: Path, plan: ExpertPlan, work: Path, texts: list[list[int]], python: str
) -> dict[str, dict[str, float]]:
    convert(model, work / "fused", "fused", plan)
    own = own_scores(work / "fused", texts)
    shutil.rmtree(work / "fused")
    result = {"fp32": {"perplexity": float(np.exp(np.concatenate([n for _, n in own]).mean()))}}
    for kind in TYPES:
        file = work / f"{kind}.gguf"
        convert_gguf(model, file, plan, gguf_type=kind)
        result[kind] = compare(file, own, texts, python)
        file.unlink()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--peer-python", required=True, help="a Python with llama-cpp-python")
    parser.add_argument("--work", type=Path, required=True, help="a directory on a disk")
    parser.add_argument("--windows", type=int, default=2, help="of 512 tokens, of each domain")
    parser.add_argument("--result", type=Path, default=RESULT)
    given = parser.parse_args()
    options = {"windows": given.windows, "ratio": RATIO, "max_tokens": TOKENS}
    record = start_record("benchmarks/compress_gguf.py", options, seed=0)
    version = "import llama_cpp; print(llama_cpp.__version__)"
    command = [given.peer_python, "-c", version]
    record.versions["llama-cpp-python"] = subprocess.check_output(command, text=True).strip()
    record.versions["gguf"] = importlib.metadata.version("gguf")
    babel = Path(resolve_model("babel"))
    texts = windows(given.data, load_tokenizer(babel), given.windows)
    work = given.work / f"moekit-compress-gguf-{os.getpid()}"
    work.mkdir(parents=True)
    metrics: dict[str, Any] = {"tokens": sum(map(len, texts)), "models": {}}
    try:
        for verb in VERBS:
            plan = plan_of(verb, given.data, work)
            metrics["models"][verb] = measure(babel, plan, work, texts, given.peer_python)
    finally:
        shutil.rmtree(work)
    given.result.write_text(record.finish(metrics).to_json())
    print(json.dumps(metrics, indent=1))
    for name, rows in metrics["models"].items():
        if rows["f16"]["agreement"] < AGREEMENT or abs(rows["f16"]["relative"]) > PERPLEXITY:
            sys.exit(f"f16 of {name} is beyond {AGREEMENT:.1%} and {PERPLEXITY:.1%}")


if __name__ == "__main__":
    main()
