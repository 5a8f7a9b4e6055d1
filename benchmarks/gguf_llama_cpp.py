"""babel and widened babel as GGUF in llama.cpp, beside transformers in fp32, on real text.

    python benchmarks/gguf_llama_cpp.py --data DATA --peer-python PEER/bin/python --work /tmp

DATA is the folder that babel was trained on (DOMAIN.valid.jsonl). PEER is an environment with
llama-cpp-python. Every token is predicted from the true ones before it. Writes
benchmarks/results/gguf_llama_cpp.json; fails where f16 is beyond the limits.
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
import torch
from widen import widen

import moekit
from moekit.bench.workers import Worker
from moekit.core.load import load_tokenizer, resolve_model
from moekit.core.record import start_record
from moekit.evaluate.text import read_texts
from moekit.export.gguf import convert_gguf

RESULT = Path(__file__).parent / "results" / "gguf_llama_cpp.json"
CONTEXT = 512
TYPES = ("f16", "q8_0", "q4_0")
# Of f16 against fp32: share of tokens with the same best prediction, relative perplexity.
AGREEMENT, PERPLEXITY = 0.995, 0.001


def windows(data: Path, tokenizer: Any, per_domain: int) -> list[list[int]]:
    """The first windows of each domain's validation text, each after the end-of-text token."""
    found = []
    for file in sorted(data.glob("*.valid.jsonl")):
        ids: list[int] = []
        for sample in read_texts(file):
            ids += [tokenizer.eos_token_id, *tokenizer(sample.text)["input_ids"]]
            if len(ids) >= per_domain * CONTEXT:
                break
        found += [ids[n * CONTEXT : (n + 1) * CONTEXT] for n in range(per_domain)]
    return [window for window in found if len(window) > 1]


def score(logits: torch.Tensor, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """The best next token [T] at each position, and nats [T - 1] of those that follow."""
    nats = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")
    return logits.argmax(-1).numpy(), nats.double().numpy()


def own_scores(model: Path, texts: list[list[int]]) -> list[tuple[np.ndarray, np.ndarray]]:
    loaded = moekit.load(model, dtype="float32")
    with torch.no_grad():
        return [score(loaded.model(torch.tensor([ids])).logits[0], ids) for ids in texts]


def compare(
    file: Path, own: list[tuple[np.ndarray, np.ndarray]], texts: list[list[int]], python: str
) -> dict[str, float]:
    with Worker("worker_llama.py", str(file), "--context", str(CONTEXT), python=python) as peer:
        found = [score(torch.from_numpy(peer.logits(ids)), ids) for ids in texts]
    same = np.concatenate([a[0] == b[0] for a, b in zip(own, found, strict=True)])
    before, after = (np.exp(np.concatenate([s[1] for s in side]).mean()) for side in (own, found))
    return {
        "agreement": float(same.mean()),
        "perplexity": float(after),
        "relative": float(after / before - 1),
        "bytes": file.stat().st_size,
    }


def measure(
    model: Path, work: Path, texts: list[list[int]], python: str
) -> dict[str, dict[str, float]]:
    own = own_scores(model, texts)
    result = {"fp32": {"perplexity": float(np.exp(np.concatenate([n for _, n in own]).mean()))}}
    for kind in TYPES:
        file = work / f"{kind}.gguf"
        convert_gguf(model, file, gguf_type=kind)
        result[kind] = compare(file, own, texts, python)
        file.unlink()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--peer-python", required=True, help="a Python with llama-cpp-python")
    parser.add_argument("--work", type=Path, default=Path("/tmp"), help="a directory on a disk")
    parser.add_argument("--width", type=int, default=8192, help="neurons of a widened expert")
    parser.add_argument("--windows", type=int, default=2, help="of 512 tokens, of each domain")
    parser.add_argument("--result", type=Path, default=RESULT)
    given = parser.parse_args()
    options = {"width": given.width, "windows": given.windows, "context": CONTEXT}
    record = start_record("benchmarks/gguf_llama_cpp.py", options, seed=0)
    version = "import llama_cpp; print(llama_cpp.__version__)"
    command = [given.peer_python, "-c", version]
    record.versions["llama-cpp-python"] = subprocess.check_output(command, text=True).strip()
    record.versions["gguf"] = importlib.metadata.version("gguf")
    babel = Path(resolve_model("babel"))
    texts = windows(given.data, load_tokenizer(babel), given.windows)
    work = given.work / f"moekit-gguf-{os.getpid()}"
    work.mkdir()
    try:
        metrics: dict[str, Any] = {"tokens": sum(map(len, texts)), "models": {}}
        metrics["models"]["babel"] = measure(babel, work, texts, given.peer_python)
        widen(babel, work / "wide", given.width)
        metrics["models"]["widened babel"] = measure(work / "wide", work, texts, given.peer_python)
    finally:
        shutil.rmtree(work)
    given.result.write_text(record.finish(metrics).to_json())
    print(json.dumps(metrics, indent=1))
    for name, rows in metrics["models"].items():
        if rows["f16"]["agreement"] < AGREEMENT or abs(rows["f16"]["relative"]) > PERPLEXITY:
            sys.exit(f"f16 of {name} is beyond {AGREEMENT:.1%} and {PERPLEXITY:.1%}")


if __name__ == "__main__":
    main()
