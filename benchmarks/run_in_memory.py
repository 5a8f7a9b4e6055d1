"""moekit beside llama.cpp and transformers where everything fits into memory.

    python benchmarks/run_in_memory.py --shape r1 --peer-python PEER/bin/python --work DIR

PEER is an environment with llama-cpp-python; DIR keeps the models (10 GB for r1, 35 GB for r2) for
the next run. The programs take turns, each on two threads, with the same random tokens, and only
after their logits were compared (r1). Writes benchmarks/results/run_in_memory_SHAPE.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from decoded import decoded_model
from reference_gguf import write_gguf
from reference_shapes import config_of, write_packed

from moekit.bench.turns import distance, in_turns, ratios, summarise, turn
from moekit.bench.workers import Worker
from moekit.core.architecture import meta_model
from moekit.core.checkpoint import TensorInfo
from moekit.core.pack import pack
from moekit.core.record import start_record
from moekit.core.seeds import generator
from moekit.core.writer import CheckpointWriter
from moekit.export.gguf import convert_gguf

RESULTS = Path(__file__).parent / "results"
PROMPT, STEPS, CONTEXT = 128, 48, 1024
# Names of what is compared; moekit's first.
INT4, BF16 = "moekit int4", "moekit bf16"
Q4, Q4_READ, Q4_HEAD, Q8, F16 = (
    "llama.cpp Q4_0",
    "llama.cpp Q4_0, no mmap",
    "llama.cpp Q4_0, head Q8_0",
    "llama.cpp Q8_0",
    "llama.cpp f16",
)
TRANSFORMERS = "transformers bf16 grouped_mm"
# Bytes that moekit is given for r2, where it would plan with what the machine has left.
MEMORY = 18_500_000_000
# moekit's error may be this many times that of transformers in bf16.
TOLERANCE = 1.1


def write_checkpoint(shape: str, out: Path) -> None:
    """A random bf16 checkpoint of the shape, row block by row block."""
    config = config_of(shape)
    state = meta_model(config).state_dict()
    infos = {name: TensorInfo(tuple(t.shape), torch.bfloat16) for name, t in state.items()}
    with CheckpointWriter(out, infos) as writer:
        for name, _ in writer.pending():
            info, random = infos[name], generator(0, name)
            for row in range(0, info.shape[0], 4096):
                size = (min(4096, info.shape[0] - row), *info.shape[1:])
                if len(size) == 1:
                    block = torch.ones(size)
                else:
                    block = torch.randn(size, generator=random) / size[-1] ** 0.5
                if "embed_tokens" in name:
                    block *= size[-1] ** 0.5
                writer.write_rows(name, row, block.bfloat16())
        writer.write_file("config.json", config.to_json_string(use_diff=False))
        writer.commit()


def prepare(shape: str, work: Path) -> dict[str, Path]:
    """Path of each model; what an earlier run left is kept."""
    steps: dict[str, tuple[str, Callable[[Path], Any]]]
    if shape == "r2":
        steps = {
            INT4: ("int4", lambda out: write_packed(shape, out, resident_codec="int4")),
            Q4: ("q4_0.gguf", lambda out: write_gguf(shape, out, "q4_0")),
        }
    else:
        model = work / "model"
        steps = {
            TRANSFORMERS: ("model", lambda out: write_checkpoint(shape, out)),
            INT4: ("int4", lambda out: pack(model, out, codec="int4")),
            BF16: ("bf16", lambda out: pack(model, out, codec="bf16")),
            Q4: ("all-q4_0.gguf", lambda out: write_gguf(shape, out, "q4_0")),
            Q4_HEAD: ("q4_0.gguf", lambda out: convert_gguf(model, out, gguf_type="q4_0")),
            Q8: ("q8_0.gguf", lambda out: convert_gguf(model, out, gguf_type="q8_0")),
            F16: ("f16.gguf", lambda out: convert_gguf(model, out, gguf_type="f16")),
        }
    work.mkdir(parents=True, exist_ok=True)
    for file, make in steps.values():
        if not (work / file).exists():
            make(work / file)
    return {name: work / file for name, (file, _) in steps.items()}


def start(name: str, paths: dict[str, Path], peer: str, memory: int | None = None) -> Worker:
    if name == TRANSFORMERS:
        return Worker("worker_transformers.py", str(paths[name]))
    if name == INT4:
        # A context as llama.cpp has here: keys and values of all the model's would not fit too.
        limit = () if memory is None else ("--memory", str(memory), "--context", "1024")
        return Worker("worker_moekit.py", str(paths[name]), "--resident-codec", "int4", *limit)
    if name == BF16:
        return Worker("worker_moekit.py", str(paths[name]))
    mmap = () if name == Q4_READ else ("--mmap",)
    return Worker("worker_llama.py", str(paths[name]), *mmap, python=peer)


def check(paths: dict[str, Path], peer: str) -> dict[str, float]:
    """Distances of logits on the same weights; exits where a program computes something else."""
    ids = tokens(2, 64, "r1")
    found = {}

    def logits(name: str) -> np.ndarray:
        with start(name, paths, peer) as worker:
            return worker.logits(ids)

    def own(model: Any) -> np.ndarray:
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0].float().numpy()

    for name, codec in ((INT4, "int4"), (BF16, None)):
        exact = own(decoded_model(paths[name], codec))
        found[f"{name} to decoded fp32"] = distance(logits(name), exact)
        plain = own(decoded_model(paths[name], codec, torch.bfloat16))
        found[f"{name}: transformers bf16 to decoded fp32"] = distance(plain, exact)
        if name == BF16:
            found[f"{F16} to fp32"] = distance(logits(F16), exact)
            found[f"{BF16} to {F16}"] = distance(logits(BF16), logits(F16))
        limit = TOLERANCE * found[f"{name}: transformers bf16 to decoded fp32"]
        if found[f"{name} to decoded fp32"] > limit:
            sys.exit(f"{name} is further from fp32 than {limit:.4f}: {json.dumps(found)}")
    return found


def tokens(seed: int, count: int, shape: str) -> list[int]:
    vocabulary = config_of(shape).vocab_size
    return np.random.default_rng(seed).integers(0, vocabulary, count).tolist()


def texts(shape: str) -> Callable[[int], tuple[list[int], list[int]]]:
    """Prompt and continuation of a round."""
    return lambda seed: (tokens(seed, PROMPT, shape), tokens(seed + 1000, STEPS, shape))


def one_by_one(
    names: list[str], paths: dict[str, Path], peer: str, shape: str, rounds: int, openings: int
) -> dict[str, Any]:
    """For programs that do not fit into memory together: each opened some times, in turns."""
    found: dict[str, Any] = {name: {"rounds": []} for name in names}
    for name in names * openings:
        with start(name, paths, peer, MEMORY) as worker:
            worker.call("prefill", ids=tokens(0, 512, shape))
            # llama.cpp has read everything by now; moekit reads an expert when it is first used.
            if name == INT4 and not worker.call("fill"):
                sys.exit(f"the experts of {paths[name]} do not fit into memory")
            for number in range(1, rounds // openings + 1):
                found[name]["rounds"].append(turn(worker, *texts(shape)(number)))
            found[name]["opening_seconds"] = worker.opening
            found[name]["memory"] = worker.call("memory")
        if name == INT4 and found[name]["memory"]["VmHWM"] > MEMORY:
            sys.exit(f"moekit was given {MEMORY} bytes and held {found[name]['memory']}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=("r1", "r2"), default="r1")
    parser.add_argument("--peer-python", required=True, help="a Python with llama-cpp-python")
    parser.add_argument("--work", type=Path, required=True, help="where the models are kept")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--openings", type=int, default=2, help="of each program, for r2")
    given = parser.parse_args()
    paths = prepare(given.shape, given.work)
    options = {"shape": given.shape, "rounds": given.rounds, "prompt": PROMPT, "steps": STEPS}
    record = start_record("benchmarks/run_in_memory.py", options | {"threads": 2}, seed=0)
    version = [given.peer_python, "-c", "import llama_cpp; print(llama_cpp.__version__)"]
    record.versions["llama-cpp-python"] = subprocess.check_output(version, text=True).strip()
    metrics: dict[str, Any] = {}
    if given.shape == "r1":
        metrics["check"] = check(paths, given.peer_python)
        names = [INT4, Q4, Q4_READ, Q4_HEAD, BF16, F16, Q8, TRANSFORMERS]
        paths[Q4_READ] = paths[Q4]
        programs = {name: partial(start, name, paths, given.peer_python) for name in names}
        found = in_turns(programs, texts(given.shape), given.rounds)
        pairs = [(INT4, Q4), (INT4, Q4_READ), (INT4, Q4_HEAD), (BF16, F16)]
        pairs += [(INT4, TRANSFORMERS), (BF16, TRANSFORMERS)]
    else:
        found = one_by_one(
            [Q4, INT4], paths, given.peer_python, given.shape, given.rounds, given.openings
        )
        pairs = [(INT4, Q4)]
    summarise(found)
    metrics |= {"programs": found, "ratios": ratios(found, pairs)}
    file = RESULTS / f"run_in_memory_{given.shape}.json"
    file.write_text(record.finish(metrics).to_json())
    for name, row in found.items():
        print(
            f"{name}: {row['decode_ms']:.2f} ms a token, prefill "
            f"{row['prefill_tokens_per_second']:.0f} tokens/s"
        )
    for name, row in metrics["ratios"].items():
        print(f"{name}: decode {row['decode']:.2f}, prefill {row['prefill']:.2f}")


if __name__ == "__main__":
    main()
