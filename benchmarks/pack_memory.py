"""Peak anonymous memory of packing random checkpoints of several sizes, with samples checked.

    python benchmarks/pack_memory.py --sizes 4GB 8GB 16GB --work DIR

makes a random bf16 checkpoint of about each size in the per-expert layout of a 30-billion-parameter
qwen3_moe (the number of layers makes the size), packs it at 4 bits, attention and output head too,
in a process of its own whose RssAnon is sampled, and compares the packed bytes of some experts and
of every other tensor with what encoding the checkpoint's own tensors gives. Needs 1.3 times the
largest size on disk, freed after each. Writes benchmarks/results/pack_memory.json, only if all were
equal.
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
from convert_memory import CONFIG, layers_for, measure, shapes

from moekit.core.checkpoint import Checkpoint, TensorInfo
from moekit.core.memory import bytes_of, format_bytes
from moekit.core.record import start_record
from moekit.core.seeds import generator
from moekit.core.writer import CheckpointWriter
from moekit.ops.codecs import make_codec
from moekit.runtime.store import ExpertStore

RESULT = Path(__file__).parent / "results" / "pack_memory.json"
LIMIT = 2e9
CODEC = "int4"
# Random numbers that tensors take their values from, each from another place.
POOL = 2**25
SAMPLES = 24

CHILD = """
import sys
from moekit.core.pack import pack
print("imported", flush=True)
sys.stdin.readline()
pack(sys.argv[1], sys.argv[2], codec=sys.argv[3], resident_codec=sys.argv[3])
print("converted", flush=True)
sys.stdin.readline()
"""


def make(path: Path, layers: int) -> None:
    """A checkpoint of finite random values, tensor by tensor."""
    infos = {name: TensorInfo(shape, torch.bfloat16) for name, shape in shapes(layers).items()}
    pool = (torch.randn(POOL, generator=generator(0, "pack_memory")) / 45).bfloat16()
    places = random.Random(0)
    with CheckpointWriter(path, infos) as writer:
        for name, row in writer.pending():
            shape = infos[name].shape
            columns = shape[1] if len(shape) > 1 else 1
            step = max(1, POOL // 2 // columns)
            for start in range(row, shape[0], step):
                rows = min(step, shape[0] - start)
                first = places.randrange(POOL - rows * columns)
                values = pool[first : first + rows * columns].view(rows, *shape[1:])
                writer.write_rows(name, start, values)
        writer.write_file("config.json", json.dumps(CONFIG | {"num_hidden_layers": layers}))
        writer.commit()


def check(source: Path, packed: Path) -> int:
    """Compare samples of experts and all else; returns how many tensors were equal."""
    codec, seen = make_codec(CODEC), 0
    with Checkpoint(source) as plain, ExpertStore.open(packed) as store:
        encoded = store.header.encoded
        assert encoded is not None
        for name, tensor in store.resident():
            expected = plain.get(name)
            if name in encoded.matrices:
                expected = codec.decode(codec.encode(expected), torch.bfloat16)
            if not torch.equal(tensor, expected):
                raise SystemExit(f"{name} differs; no result is written")
            seen += 1
        chosen = random.Random(1)
        for _ in range(SAMPLES):
            layer = chosen.randrange(len(store.layers))
            expert = chosen.randrange(store.layers[layer].num_experts)
            parts = store.read(layer, expert)
            for matrix, found in parts.matrices.items():
                name = f"{store.layers[layer].path}.experts.{expert}.{matrix}_proj.weight"
                if not torch.equal(
                    codec.decode(found), codec.decode(codec.encode(plain.get(name)))
                ):
                    raise SystemExit(f"{name} differs; no result is written")
                seen += 1
    return seen


def run(size: int, work: Path) -> dict[str, Any]:
    layers = layers_for(size)
    try:
        make(work / "source", layers)
        found = measure(work / "source", work / "packed", CODEC, CHILD)
        with Checkpoint(work / "source") as source:
            nbytes = source.nbytes
        compared = check(work / "source", work / "packed")
        packed = sum(file.stat().st_size for file in (work / "packed").iterdir())
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return {
        "checkpoint_bytes": nbytes,
        "packed_bytes": packed,
        "layers": layers,
        "tensors_compared": compared,
        **found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=["4GB", "8GB", "16GB"])
    parser.add_argument("--work", type=Path, required=True, help="a directory on a disk")
    parser.add_argument("--result", type=Path, default=RESULT)
    given = parser.parse_args()
    options = {"sizes": given.sizes, "codec": CODEC}
    record = start_record("benchmarks/pack_memory.py", options, seed=0)
    rows = []
    for size in given.sizes:
        row = run(bytes_of(size), given.work / f"moekit-pack-memory-{os.getpid()}")
        rows.append(row)
        print(
            f"{format_bytes(row['checkpoint_bytes'])}: peak {format_bytes(row['rss_anon_peak'])}, "
            f"{format_bytes(row['above_import'])} above import, {row['seconds']} s",
            flush=True,
        )
    metrics = {"limit": LIMIT, "rows": rows, "load_average_at_end": os.getloadavg()[0]}
    given.result.write_text(record.finish(metrics).to_json())
    if any(row["rss_anon_peak"] > LIMIT for row in rows):
        raise SystemExit(f"more than {format_bytes(LIMIT)}")


if __name__ == "__main__":
    main()
