"""Widened babel on real text with a part of its experts in memory, beside llama.cpp's mapping.

    python benchmarks/run_larger_than_memory.py --data DATA --peer-python PEER/bin/python --work DIR

DATA is the folder that babel was trained on (DOMAIN.valid.jsonl). PEER is an environment with
llama-cpp-python; DIR keeps the models (8 GB while they are made, 4 GB after) for the next run.
Texts are decoded token by token with the true token given each time. moekit runs in a memory
cgroup whose limit is the sum that the engine prints, llama.cpp in a cgroup with the same limit.
Needs root, for the cgroups. Writes benchmarks/results/run_larger_than_memory.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
from memory_cgroup import MemoryCgroup, forget_pages
from widen import widen

from moekit.bench.workers import Worker, WorkerError
from moekit.core.cache_score import CacheScore
from moekit.core.load import load_tokenizer, resolve_model
from moekit.core.pack import pack
from moekit.core.record import start_record
from moekit.core.replay import replay
from moekit.evaluate.text import read_texts
from moekit.export.gguf import convert_gguf
from moekit.runtime.disk_speed import disk_speed
from moekit.runtime.store import ExpertStore

RESULT = Path(__file__).parent / "results" / "run_larger_than_memory.json"
SHARES = (0.6, 0.35, 0.2)
CONTEXT = 512
BELADY = CacheScore(future="next use")


def prepare(work: Path, width: int) -> tuple[Path, Path]:
    """The packed model and the GGUF file of babel widened; what an earlier run left is kept."""
    packed, gguf, wide = work / f"int4-{width}", work / f"q4_0-{width}.gguf", work / "wide"
    work.mkdir(parents=True, exist_ok=True)
    if not (packed.exists() and gguf.exists()):
        widen("babel", wide, width, overwrite=True)
        if not packed.exists():
            pack(wide, packed, codec="int4")
        if not gguf.exists():
            convert_gguf(wide, gguf, gguf_type="q4_0")
        shutil.rmtree(wide)
    return packed, gguf


def texts(data: Path, domains: int, length: int) -> list[list[int]]:
    """The beginnings of the first long enough document of some domains, as token ids."""
    tokenizer = load_tokenizer(Path(resolve_model("babel")))
    files = sorted(data.glob("*.valid.jsonl"))
    found = []
    for file in files[:: max(1, len(files) // domains)][:domains]:
        documents = (tokenizer(sample.text)["input_ids"] for sample in read_texts(file))
        ids = next(ids for ids in documents if len(ids) >= length)
        found.append([tokenizer.eos_token_id, *ids[: length - 1]])
    return found


def decode(worker: Worker, documents: list[list[int]], limit: float) -> tuple[int, float]:
    """Tokens decoded and the seconds they took; ends after `limit` seconds."""
    count, seconds = 0, 0.0
    for ids in documents:
        for position, token in enumerate(ids):
            if position == 0:
                seconds += worker.call("prefill", ids=[token])
            else:
                seconds += worker.call("decode", ids=[token])[0]
            count += 1
            if seconds > limit:
                return count, seconds
    return count, seconds


def run_moekit(
    packed: Path, cache: int, documents: list[list[int]], *options: str, warm: bool = False
) -> dict[str, Any]:
    """One run in a cgroup limited to the engine's own sum; `warm` measures the second time. The
    speed of the disk, which drifts, is measured between the documents."""
    arguments = [str(packed), "--context", str(CONTEXT), "--expert-cache", str(cache), *options]
    with MemoryCgroup(f"moekit-{os.getpid()}") as group:
        with Worker("worker_moekit.py", *arguments, wrap=group.wrap) as worker:
            limit = worker.call("stats")["budget"]["limit"]
            group.limit(limit)
            if warm:
                decode(worker, documents, 1e9)
            count, seconds, speeds = 0, 0.0, [disk_bandwidth(packed)]
            for document in documents:
                more, taken = decode(worker, [document], 1e9)
                count, seconds = count + more, seconds + taken
                speeds.append(disk_bandwidth(packed))
            stats = worker.call("stats")
        found = {"limit": limit, "peak_charge": group.peak, "disk_bandwidths": speeds}
    return (
        found | {"tokens": count, "seconds": seconds, "tokens_per_second": count / seconds} | stats
    )


def belady(routing: list[list[int]], layers: int, experts: int, slots: int) -> float:
    """Hit rate of the best possible cache of `slots` that all layers share, on steps [T L, K]."""
    steps = np.array(routing, dtype=np.int32)
    steps += (np.arange(len(steps)) % layers * experts)[:, None].astype(np.int32)
    found = replay(steps[:, None], layers * experts, BELADY, [slots], layers=layers, hold=True)
    return float(found.hit_rate[0])


def run_llama(
    gguf: Path, python: str, limit: int, documents: list[list[int]], patience: float, *more: str
) -> dict[str, Any]:
    """llama.cpp's memory mapping in a cgroup limited from the start; says how it ended."""
    forget_pages(gguf)
    found: dict[str, Any] = {"limit": limit}
    with MemoryCgroup(f"llama-{os.getpid()}") as group:
        group.limit(limit)
        arguments = (str(gguf), "--mmap", "--context", str(CONTEXT), *more)
        try:
            with Worker(
                "worker_llama.py", *arguments, python=python, wrap=group.wrap, patience=patience
            ) as worker:
                found["opening_seconds"] = worker.opening
                count, taken = decode(worker, documents, patience / 2)
                found |= {"tokens": count, "seconds": taken, "tokens_per_second": count / taken}
        except WorkerError as error:
            found["ended"] = str(error).strip().splitlines()[-1]
        found["peak_charge"] = group.peak
    return found


def disk_bandwidth(packed: Path) -> float:
    """Bytes a second of the disk, by the readers that the engine has."""
    with ExpertStore.open(packed) as store:
        return disk_speed(store, 1.0).bandwidth


def bound(off: dict[str, Any], compute: float, bandwidth: float) -> float:
    """Seconds that no schedule can beat: computing alone, or reading what is read on demand."""
    return max(compute, off["cache"]["demand_bytes"] / bandwidth)


def measure(
    packed: Path,
    gguf: Path,
    python: str,
    documents: list[list[int]],
    patience: float,
    shares: list[float],
) -> dict[str, Any]:
    with ExpertStore.open(packed) as store:
        everything, layers, record = store.expert_bytes, store.layers, store.nbytes(0, 0)
    options = ("--no-prefetch", "--record-routing")
    whole = run_moekit(packed, everything, documents, *options, warm=True)
    routing = whole.pop("routing")
    routing = routing[len(routing) // 2 :]
    rows = {}
    for share in shares:
        cache = int(share * everything)
        off = run_moekit(packed, cache, documents, "--no-prefetch")
        on = run_moekit(packed, cache, documents)
        bandwidth = statistics.harmonic_mean(on["disk_bandwidths"])
        best = belady(routing, len(layers), layers[0].num_experts, cache // record)
        default = run_llama(gguf, python, on["limit"], documents, patience)
        llama = run_llama(gguf, python, on["limit"], documents, patience, "--no-repack")
        hits, misses = off["engine"]["hits"], off["engine"]["misses"]
        rows[f"{share:.0%}"] = {
            "expert_cache": cache,
            "hit_rate": hits / (hits + misses),
            "belady": best,
            "share_of_belady": hits / (hits + misses) / best,
            "bytes_read": off["cache"]["demand_bytes"],
            "bytes_ratio": on["engine"]["bytes_read"] / off["cache"]["demand_bytes"],
            "disk_bandwidth": bandwidth,
            "time_ratio": on["seconds"] / bound(off, whole["seconds"], bandwidth),
            "llama_ratio": on["tokens_per_second"] / llama.get("tokens_per_second", float("nan")),
            "prefetch_off": off,
            "prefetch_on": on,
            "llama": llama,
            "llama_repacked": default,
        }
    return {
        "expert_bytes": everything,
        "expert_record": record,
        "all_in_memory": whole,
        "rows": rows,
    }


def earlier(options: dict[str, Any]) -> dict[str, Any]:
    """The rows of the result that is there, if it was made with the same options."""
    found = json.loads(RESULT.read_text()) if RESULT.is_file() else {"options": None}
    return found["metrics"]["rows"] if found["options"] == options else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--peer-python", required=True, help="a Python with llama-cpp-python")
    parser.add_argument("--work", type=Path, required=True, help="where the models are kept")
    parser.add_argument("--width", type=int, default=24576, help="neurons of a widened expert")
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--length", type=int, default=128, help="tokens of a document")
    parser.add_argument("--patience", type=float, default=120, help="seconds llama.cpp is given")
    parser.add_argument(
        "--shares",
        nargs="+",
        type=float,
        default=SHARES,
        help="of the experts in memory; other rows stay as an earlier run with these options left "
        "them",
    )
    given = parser.parse_args()
    packed, gguf = prepare(given.work, given.width)
    documents = texts(given.data, given.documents, given.length)
    names = ("width", "documents", "length", "patience")
    options = {name: getattr(given, name) for name in names}
    record = start_record("benchmarks/run_larger_than_memory.py", options | {"threads": 2}, seed=0)
    version = [given.peer_python, "-c", "import llama_cpp; print(llama_cpp.__version__)"]
    record.versions["llama-cpp-python"] = subprocess.check_output(version, text=True).strip()
    metrics = measure(packed, gguf, given.peer_python, documents, given.patience, given.shares)
    metrics["rows"] = earlier(record.options) | metrics["rows"]
    RESULT.write_text(record.finish(metrics).to_json())
    for share, row in metrics["rows"].items():
        off, on = (row[key]["tokens_per_second"] for key in ("prefetch_off", "prefetch_on"))
        print(
            f"{share}: hits {row['hit_rate']:.3f} of {row['belady']:.3f}, {off:.1f} tokens/s, with "
            f"prefetch {on:.1f}, time {row['time_ratio']:.2f} and bytes {row['bytes_ratio']:.2f} "
            f"of the bound, llama.cpp x{row['llama_ratio']:.1f} {row['llama'].get('ended', '')}"
        )


if __name__ == "__main__":
    main()
