"""babel in fewer bytes: moekit's programmes beside llama.cpp's quantised files and plain methods.

    python benchmarks/compress_peers.py --data DATA --peer-python PEER/bin/python --work DIR

DATA is the folder that babel was trained on: DOMAIN.train.jsonl calibrates, windows of
DOMAIN.valid.jsonl are scored, every token predicted from the true ones before it. PEER is an
environment with llama-cpp-python: it quantises an f16 file of babel itself, and scores each file
itself. What moekit makes is made by `moekit compress`, stored packed and scored by the engine.
Bytes are those of all weights but the embedding of the input, of which a token needs one row and
which stays in 16 bits everywhere. Goes on where it stopped; writes
benchmarks/results/compress_peers.json.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf_llama_cpp import CONTEXT, score, windows
from resumable import Done, OutOfTime
from safetensors import safe_open

from moekit.bench.workers import Worker
from moekit.core.load import find_model, load_tokenizer
from moekit.core.packed_header import PackedHeader
from moekit.core.record import start_record
from moekit.export.gguf import convert_gguf
from moekit.runtime.store import ExpertStore

RESULT = Path(__file__).parent / "results" / "compress_peers.json"
TOKENS = "20000"
SEEDS = (0, 1, 2)
# llama.cpp's numbers of its mixtures (llama_ftype).
LLAMA = {
    "Q8_0": 7,
    "Q6_K": 18,
    "Q5_K_M": 17,
    "Q4_K_M": 15,
    "Q4_0": 2,
    "Q3_K_M": 12,
    "Q2_K": 10,
}
# Mixes of two widths: their average, they, and the rest of the model.
MIXES = (
    ("3.7", "3,4", "int8"),
    ("3.5", "3,4", "int8"),
    ("2.7", "2,3", "int8"),
    ("3.3", "3,4", "int4"),
)
QUANTISE = """
import ctypes, sys, llama_cpp as peer
params = peer.llama_model_quantize_default_params()
params.ftype, params.nthread, params.token_embedding_type = int(sys.argv[3]), 2, 1
quiet = peer.llama_log_callback(lambda *_: None)
peer.llama_log_set(quiet, ctypes.c_void_p(0))
sys.exit(peer.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), params))
"""


@dataclass(frozen=True)
class Case:
    """One packed model: a share of the experts pruned by `score` first, then `quantize` arguments
    (none: 16 bits), the rest of the model by `resident`. `peer`: what another tool would do."""

    name: str
    quantize: tuple[str, ...] = ()
    resident: str = "int8"
    prune: float = 0.0
    score: str = "reap"
    peer: bool = False


def uniform(method: str, codec: str, group: int, *more: str) -> tuple[str, ...]:
    return ("--method", method, "--codec", codec, "--group-size", str(group), *more)


def cases() -> list[Case]:
    found = []
    for bits in (4, 3, 2):
        for method in ("rtn", "gptq"):
            # One scale for 128 weights and no zero point: what other tools write by default.
            arguments = uniform(method, f"int{bits}", 128)
            found.append(Case(f"{method} {bits} bits, groups of 128", arguments, peer=True))
    for ratio in (0.5, 0.625, 0.75):
        found.append(Case(f"REAP, {ratio:.1%} of the experts", prune=ratio, peer=True))
    for resident in ("int8", "int4"):
        for bits in (4, 3, 2):
            arguments = uniform("gptq:reach=0.5", f"int{bits}-zp", 64)
            found.append(Case(f"{bits} bits, rest {resident}", arguments, resident))
    found.append(Case("8 bits, rest int8", uniform("gptq", "int8", 64)))
    for average in ("2.5", "2.75"):
        mix = uniform("gptq:reach=0.5", "int3-zp", 64, "--bits-avg", average)
        found.append(Case(f"{average} bits by programme, rest int8", mix))
    for average, widths, resident in MIXES:
        mix = uniform("gptq:reach=0.5", "int3-zp", 64, "--bits-avg", average, "--widths", widths)
        name = f"{average} bits of {widths.replace(',', ' and ')}, rest {resident}"
        found.append(Case(name, mix, resident))
    for ratio in (0.125, 0.25):
        for bits in (4, 3):
            arguments = uniform("gptq:reach=0.5", f"int{bits}-zp", 64)
            name = f"EASY-EP {ratio:.1%}, then {bits} bits, rest int8"
            found.append(Case(name, arguments, prune=ratio, score="easy-ep"))
    return found


class Bench:
    def __init__(self, data: Path, work: Path, python: str, per_domain: int) -> None:
        self.babel, self.work, self.python = find_model("babel"), work, python
        self.tokenizer = load_tokenizer(self.babel)
        self.texts = windows(data, self.tokenizer, per_domain)
        self.data = [
            part for file in sorted(data.glob("*.train.jsonl")) for part in ("--data", str(file))
        ]

    @property
    def scored_bytes(self) -> int:
        """Of the text that the scored tokens stand for."""
        return sum(len(self.tokenizer.decode(ids[1:]).encode()) for ids in self.texts)

    def bits_per_byte(self, worker: Worker) -> float:
        nats = sum(score(torch.from_numpy(worker.logits(x)), x)[1].sum() for x in self.texts)
        return float(nats) / math.log(2) / self.scored_bytes

    def llama(self, kind: str) -> dict[str, Any]:
        plain, file = self.work / "f16.gguf", self.work / f"{kind}.gguf"
        if not plain.exists():
            convert_gguf(self.babel, plain, gguf_type="f16")
        if kind == "f16":
            file = plain
        else:
            command = [self.python, "-c", QUANTISE, str(plain), str(file), str(LLAMA[kind])]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        found = {"bytes": gguf_bytes(file), "types": gguf_types(file)}
        arguments = (str(file), "--context", str(CONTEXT))
        with Worker("worker_llama.py", *arguments, python=self.python) as worker:
            found["bpb"] = self.bits_per_byte(worker)
        if file != plain:
            file.unlink()
        return found

    def moekit(self, case: Case, seed: int) -> dict[str, Any]:
        source, out = "babel", self.work / "packed"
        sample = [*self.data, "--max-tokens", TOKENS, "--seed", str(seed)]
        last = ["--to", "packed", "--resident-codec", case.resident]
        pruned = self.work / "pruned"
        if case.prune:
            target = [str(pruned if case.quantize else out)]
            how = ["--method", case.score, "--ratio", str(case.prune), *sample]
            if not case.quantize:
                how += [*last, "--codec", "bf16"]
            moekit_verb("prune", source, *target, *how)
            source = str(pruned)
        if case.quantize:
            moekit_verb("quantize", source, str(out), *case.quantize, *sample, *last)
        try:
            with Worker("worker_moekit.py", str(out), "--context", str(CONTEXT)) as worker:
                return {"bytes": packed_bytes(out), "bpb": self.bits_per_byte(worker)}
        finally:
            shutil.rmtree(out)
            shutil.rmtree(pruned, ignore_errors=True)


def moekit_verb(verb: str, *arguments: str) -> None:
    command = [sys.executable, "-m", "moekit", "compress", verb, *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def gguf_tensors(file: Path) -> list[Any]:
    from gguf import GGUFReader

    return [one for one in GGUFReader(file).tensors if one.name != "token_embd.weight"]


def gguf_bytes(file: Path) -> int:
    return sum(int(one.n_bytes) for one in gguf_tensors(file))


def gguf_types(file: Path) -> dict[str, str]:
    """The number format of each kind of expert matrix and of the output head, in layer 0."""
    names = ("blk.0.ffn_gate_exps.weight", "blk.0.ffn_down_exps.weight", "output.weight")
    return {one.name: one.tensor_type.name for one in gguf_tensors(file) if one.name in names}


def packed_bytes(directory: Path) -> int:
    """Of the experts' codes and scales and of the resident tensors, without what aligns them."""
    size = 0
    with ExpertStore.open(directory) as store:
        for position, layer in enumerate(store.layers):
            for expert in range(layer.num_experts):
                parts = store.read(position, expert)
                size += sum(matrix.nbytes for matrix in parts.matrices.values())
    for name in PackedHeader.read(directory).resident_files:
        with safe_open(directory / name, "pt") as resident:
            kept = [key for key in resident.keys() if "embed_tokens" not in key]  # noqa: SIM118
            size += sum(resident.get_tensor(key).nbytes for key in kept)
    return size


def measure(bench: Bench, done: Done) -> list[dict[str, Any]]:
    rows = []
    for kind in ("f16", *LLAMA):
        found = done.of(f"llama.cpp {kind}", lambda kind=kind: bench.llama(kind))
        rows.append({"name": f"llama.cpp {kind}", "peer": True, **found})
    for case in cases():
        runs = [
            done.of(f"{case.name}, {seed}", lambda c=case, s=seed: bench.moekit(c, s))
            for seed in SEEDS
        ]
        losses = [run["bpb"] for run in runs]
        rows.append(
            {
                **{"name": case.name, "peer": case.peer, "bytes": runs[0]["bytes"]},
                **{"bpb": statistics.mean(losses), "spread": max(losses) - min(losses)},
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--peer-python", required=True, help="a Python with llama-cpp-python")
    parser.add_argument("--work", type=Path, required=True, help="a directory on a disk")
    parser.add_argument("--windows", type=int, default=2, help="of 512 tokens, of each domain")
    parser.add_argument("--seconds", type=float, help="stop after so many, to be called again")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    options = {"windows": given.windows, "max_tokens": TOKENS, "seeds": len(SEEDS)}
    deadline = None if given.seconds is None else time.monotonic() + given.seconds
    done = Done(given.work / "compress_peers.partial.json", options, deadline)
    record = start_record("benchmarks/compress_peers.py", options, seed=0)
    version = "import llama_cpp; print(llama_cpp.__version__)"
    command = [given.peer_python, "-c", version]
    record.versions["llama-cpp-python"] = subprocess.check_output(command, text=True).strip()
    bench = Bench(given.data, given.work, given.peer_python, given.windows)
    try:
        rows = measure(bench, done)
    except OutOfTime:
        print(f"{len(done.found)} parts are done; call again to go on")
        return
    record.finish({"scored_bytes": bench.scored_bytes, "rows": rows})
    RESULT.write_text(record.to_json())
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
