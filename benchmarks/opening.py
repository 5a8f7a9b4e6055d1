"""How long opening a packed model takes, beside reading its resident part from the disk.

    python benchmarks/opening.py --work DIR

The resident part is that of R2 (`reference_shapes.py`), 1.5 billion parameters; the experts are 8 a
layer, since opening reads none of them. DIR keeps the two models (6 GB). Each opening is a process
of its own, past the page cache; libraries are imported before, as in a program that runs. The
forms: the resident part stored as it is, stored encoded, and stored as it is and encoded while it
is opened. Logits of the last two must be equal, or nothing is written. Writes
benchmarks/results/opening.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

from reference_shapes import config_of, write_packed

from moekit.core.record import start_record

RESULT = Path(__file__).parent / "results" / "opening.json"
CODEC, THREADS = "int4", 2
# Name: folder, codec that opening is asked for.
FORMS = {
    "as stored": ("plain", None),
    "stored encoded": ("encoded", None),
    "encoded at opening": ("plain", CODEC),
}


def child(directory: str, codec: str) -> None:
    """Import, read the resident part alone, open, and run a few tokens."""
    import moekit
    from moekit.ops.native import library
    from moekit.runtime import open_packed
    from moekit.runtime.store import ExpertStore

    # What a program that runs has done before.
    assert open_packed
    library()
    with ExpertStore.open(directory) as store:
        stored = sum(info.nbytes for info in store.resident_info().values())
        started = time.perf_counter()
        for _ in store.resident_stored(whole=True):
            pass
        reading = time.perf_counter() - started
    started = time.perf_counter()
    with moekit.open_engine(
        directory, threads=THREADS, resident_codec=codec or None, max_context=64, streams=1
    ) as engine:
        opening = time.perf_counter() - started
        logits = engine.runner.forward([engine.runner.new_sequence(8)], [[1, 2, 3]])
    found = {
        "stored_bytes": stored,
        "reading_seconds": reading,
        "opening_seconds": opening,
        "logits": zlib.crc32(logits.numpy().tobytes()),
    }
    print(json.dumps(found))


def run(directory: Path, codec: str | None) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", str(directory), codec or ""]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{directory} ended with {done.returncode}: {done.stderr[-1000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="where the models are kept")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--result", type=Path, default=RESULT)
    given = parser.parse_args()
    config = config_of("r2")
    config.num_experts, config.num_experts_per_tok = 8, 2
    given.work.mkdir(parents=True, exist_ok=True)
    for folder, codec in (("plain", None), ("encoded", CODEC)):
        if not (given.work / folder).exists():
            write_packed(config, given.work / folder, CODEC, resident_codec=codec)
    options = {"rounds": given.rounds, "codec": CODEC, "threads": THREADS}
    record = start_record("benchmarks/opening.py", options, seed=0)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in FORMS}
    for _ in range(given.rounds):
        for name, (folder, codec) in FORMS.items():
            runs[name].append(run(given.work / folder, codec))
    found = {run["logits"] for name in list(FORMS)[1:] for run in runs[name]}
    if len(found) > 1:
        raise SystemExit("stored encoded and encoded at opening, the logits differ")
    rows = {}
    for name, made in runs.items():
        reading, opening = (
            statistics.median(run[f"{what}_seconds"] for run in made)
            for what in ("reading", "opening")
        )
        rows[name] = {"reading": reading, "opening": opening, "rounds": made}
        size = made[0]["stored_bytes"] / 1e9
        print(f"{name}: {size:.2f} GB read in {reading:.2f} s, opened in {opening:.2f} s")
    given.result.write_text(record.finish({"rows": rows}).to_json())


if __name__ == "__main__":
    main()
