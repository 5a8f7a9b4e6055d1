"""Applying plans to a large random checkpoint: memory, and time beside reading and writing once.

    python benchmarks/compress_apply.py --size 20GB --work DIR

makes a random bf16 checkpoint of about that size (as `pack_memory.py`), drops half of its experts,
and rounds all of them to 4 bits, packed, each in a process of its own whose RssAnon is sampled. The
yardstick reads the bytes that a run has to read and writes those that it writes, by large blocks,
and makes them durable as often. Caches of files are dropped before each run. All tensors of the
pruned model and samples of the packed one are compared with what they must be; the result,
benchmarks/results/compress_apply.json, is only written if all are equal. Needs twice the size on
disk, which is freed at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import torch
from convert_memory import CONFIG, layers_for, measure
from pack_memory import make

from moekit.core.checkpoint import Checkpoint
from moekit.core.memory import bytes_of, format_bytes
from moekit.core.plan import Action, ExpertPlan
from moekit.core.record import start_record
from moekit.ops.codecs import make_codec
from moekit.runtime.store import ExpertStore

RESULT = Path(__file__).parent / "results" / "compress_apply.json"
LIMIT = 3e9
SAMPLES = 24

PRUNE = """
import sys, time
from moekit.core.convert import convert
print("imported", flush=True)
sys.stdin.readline()
start = time.process_time()
convert(sys.argv[1], sys.argv[2], "per-expert", sys.argv[3])
open(sys.argv[2] + ".cpu", "w").write(str(time.process_time() - start))
print("converted", flush=True)
sys.stdin.readline()
"""
ROUND = PRUNE.replace("core.convert import convert", "core.pack import pack").replace(
    'convert(sys.argv[1], sys.argv[2], "per-expert", sys.argv[3])',
    "pack(sys.argv[1], sys.argv[2], sys.argv[3])",
)
# As many bytes as a run reads and writes, made durable as often as the writer does.
YARDSTICK = """
import os, sys, time
from pathlib import Path
from moekit.core.writer import JOURNAL_BYTES
print("imported", flush=True)
sys.stdin.readline()
start = time.process_time()
left_to_read, left_to_write = map(int, sys.argv[3].split(","))
ratio = left_to_write / left_to_read
block, owed, unsynced = bytearray(2**26), 0.0, 0
with open(sys.argv[2], "wb", buffering=0) as out:
    for file in sorted(Path(sys.argv[1]).glob("*.safetensors")):
        with file.open("rb", buffering=0) as source:
            while left_to_read > 0 and (count := source.readinto(block)):
                left_to_read -= count
                owed += count * ratio
                size = min(int(owed), left_to_write)
                for start in range(0, size, count):
                    out.write(memoryview(block)[: min(count, size - start)])
                owed -= size
                left_to_write -= size
                unsynced += size
                if unsynced >= JOURNAL_BYTES:
                    os.fsync(out.fileno())
                    unsynced = 0
    os.fsync(out.fileno())
open(sys.argv[2] + ".cpu", "w").write(str(time.process_time() - start))
print("converted", flush=True)
sys.stdin.readline()
"""


def drop_caches(directory: Path) -> None:
    """Have the next reader read from the disk."""
    for file in directory.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def kept_experts(layer: int) -> list[int]:
    """Every other expert, of odd layers the others."""
    return list(range(layer % 2, CONFIG["num_experts"], 2))


def plans(work: Path, layers: int) -> dict[str, Path]:
    drop = {
        layer: {
            e: Action(drop=True)
            for e in range(CONFIG["num_experts"])
            if e not in kept_experts(layer)
        }
        for layer in range(layers)
    }
    bits = {
        layer: {e: Action(bits=4) for e in range(CONFIG["num_experts"])} for layer in range(layers)
    }
    paths = {"prune": work / "prune.json", "round": work / "round.json"}
    ExpertPlan(drop).save(paths["prune"])
    ExpertPlan(bits).save(paths["round"])
    return paths


def check_pruned(source: Path, out: Path) -> int:
    """Compare every tensor with the one that it was; returns their number."""
    kept = {}
    with Checkpoint(source) as plain, Checkpoint(out) as pruned:
        for name in pruned.names():
            stem, _, rest = name.partition(".experts.")
            layer = int(name.split(".")[2]) if name.startswith("model.layers.") else 0
            if layer not in kept:
                kept[layer] = kept_experts(layer)
            found = pruned.get(name)
            if rest:
                slot, _, projection = rest.partition(".")
                expected = plain.get(f"{stem}.experts.{kept[layer][int(slot)]}.{projection}")
            else:
                expected = plain.get(name)
                if name.endswith("mlp.gate.weight"):
                    expected = expected[kept[layer]]
            if not torch.equal(found, expected):
                raise SystemExit(f"{name} differs; no result is written")
        return len(pruned)


def check_rounded(source: Path, packed: Path) -> int:
    """Compare samples of the records with the codec's own work; returns their number."""
    codec, chosen = make_codec("int4", 32), random.Random(1)
    with Checkpoint(source) as plain, ExpertStore.open(packed) as store:
        for _ in range(SAMPLES):
            layer = chosen.randrange(len(store.layers))
            expert = chosen.randrange(store.layers[layer].num_experts)
            for matrix, found in store.read(layer, expert).matrices.items():
                name = f"{store.layers[layer].path}.experts.{expert}.{matrix}_proj.weight"
                expected = codec.decode(codec.encode(plain.get(name)))
                if not torch.equal(codec.decode(found), expected):
                    raise SystemExit(f"{name} differs; no result is written")
    return SAMPLES


def cpu_seconds(out: Path) -> float:
    """Processor time of the run that wrote `out`."""
    return round(float(out.with_name(out.name + ".cpu").read_text()), 1)


def size_of(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="20GB", help="size of the checkpoint, such as 1GB")
    parser.add_argument("--work", type=Path, required=True, help="a directory on a disk")
    parser.add_argument("--result", type=Path, default=RESULT)
    given = parser.parse_args()
    work = given.work / f"moekit-compress-apply-{os.getpid()}"
    record = start_record("benchmarks/compress_apply.py", {"size": given.size}, seed=0)
    runs: dict[str, dict[str, Any]] = {}
    try:
        layers = layers_for(bytes_of(given.size))
        make(work / "source", layers)
        source, found = size_of(work / "source"), plans(work, layers)
        for name, code, check in (
            ("prune half", PRUNE, check_pruned),
            ("round to 4 bits", ROUND, check_rounded),
        ):
            drop_caches(work / "source")
            plan = found["prune" if code is PRUNE else "round"]
            run = measure(work / "source", work / "out", str(plan), code)
            written = size_of(work / "out")
            run["compared"] = check(work / "source", work / "out")
            shutil.rmtree(work / "out")
            # Of a pruned model only what stays is read.
            read = written if code is PRUNE else source
            drop_caches(work / "source")
            yardstick = measure(work / "source", work / "bytes", f"{read},{written}", YARDSTICK)
            (work / "bytes").unlink()
            runs[name] = {
                **run,
                "cpu_seconds": cpu_seconds(work / "out"),
                "bytes_read": read,
                "bytes_written": written,
                "yardstick_seconds": yardstick["seconds"],
                "yardstick_cpu_seconds": cpu_seconds(work / "bytes"),
            }
            print(json.dumps({name: runs[name]}), flush=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    metrics = {
        "checkpoint_bytes": source,
        "layers": layers,
        "limit": LIMIT,
        "load_average_at_end": os.getloadavg()[0],
        "runs": runs,
    }
    given.result.write_text(record.finish(metrics).to_json())
    for name, run in runs.items():
        print(
            f"{name}: {format_bytes(run['rss_anon_peak'])} at most, {run['seconds']} s; reading "
            f"and writing the bytes {run['yardstick_seconds']} s"
        )
    if any(run["rss_anon_peak"] > LIMIT for run in runs.values()):
        raise SystemExit(f"more than {format_bytes(LIMIT)}")


if __name__ == "__main__":
    main()
