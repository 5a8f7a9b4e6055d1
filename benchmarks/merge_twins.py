"""Models that do not share their order of units, merged by index and after alignment.

    python benchmarks/merge_twins.py --data DATA --work DIR

DATA and DIR are those of upcycle_table.py, whose dense models are used (and trained if they are not
there). Dense: pairs of models trained from different initial weights. MoE: pairs grown from one
dense model with half of every expert's neurons drawn anew by different seeds, then trained on other
windows each. Every merge is an average of the two; losses are of held-out windows of all domains,
in nats a token. Writes benchmarks/results/merge_twins.json.
"""

from __future__ import annotations

import argparse
import functools
import shutil
from pathlib import Path
from typing import Any

import torch
from upcycle_table import AUX, SEEDS, Bench

import moekit
from moekit.core.record import start_record
from moekit.merge.recipe import merge_from_dict
from moekit.merge.run import run_recipe
from moekit.upcycle.run import Request, upcycle

RESULT = Path(__file__).parent / "results" / "merge_twins.json"
# Of a MoE of a pair; tokens of text from which units are matched.
STEPS, CALIBRATION = 120, 16_384
DENSE: dict[str, dict[str, Any]] = {
    "average by index": {"merge_method": "linear"},
    "PLeaS, same width": {"merge_method": "pleas"},
    "PLeaS, half of the neurons kept apart": {
        "merge_method": "pleas",
        "parameters": {"ratio": 0.5},
    },
}
MOE: dict[str, dict[str, Any]] = {
    "average by index": {"merge_method": "linear"},
    "average of aligned experts": {"merge_method": "linear", "align": "experts"},
}


def loss_of(bench: Bench, path: Path) -> float:
    return bench.texts.held_out_loss(moekit.load_language_model(path, dtype="float32").model)[0]


def moe_twin(bench: Bench, seed: int, twin: int) -> Path:
    """A MoE of the dense model of `seed`, with its own draws and windows."""
    name, own = f"twin-{twin}", 100 * seed + twin

    def make() -> None:
        grown = bench.work / "twin-grown"
        request = Request(
            "drop", str(bench.base(seed)), options={"experts": 8, "top_k": 2, "reinit": 0.5}
        )
        upcycle(request, grown, seed=own, overwrite=True)
        out = bench.train(name, {"path": str(grown)}, STEPS, own, balance=AUX)[1]
        out.replace(bench.work / f"{name}-of-{seed}")

    out = bench.work / f"{name}-of-{seed}"
    if not out.exists():
        make()
    return out


def merged(bench: Bench, models: list[Path], data: Path, recipe: dict[str, Any]) -> float:
    out = bench.work / "twins-merged"
    shutil.rmtree(out, ignore_errors=True)
    weights = {} if recipe["merge_method"] == "pleas" else {"weight": 1.0}
    fields = {
        "models": [
            {"model": str(path), "data": str(data), "parameters": weights} for path in models
        ],
        "data": {"max_tokens": CALIBRATION, "seq_len": 128},
        "dtype": "float32",
    }
    run_recipe([merge_from_dict({**fields, **recipe})], out, seed=0, restart=True)
    return loss_of(bench, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    options = {"steps": STEPS, "calibration": CALIBRATION}
    record = start_record("benchmarks/merge_twins.py", options, seed=0)
    bench = Bench(given.data, given.work)
    text = given.work / "twins-text"
    text.mkdir(exist_ok=True)
    for file in given.data.glob("*.train.jsonl"):
        shutil.copy(file, text / file.name)
    rows = []
    for seed in SEEDS:
        dense = [bench.base(seed), bench.base(SEEDS[(seed + 1) % len(SEEDS)])]
        moe = [moe_twin(bench, seed, twin) for twin in (0, 1)]
        for kind, models, recipes in (("dense", dense, DENSE), ("MoE", moe, MOE)):
            add = functools.partial(dict, seed=seed, kind=kind)
            rows += [add(name="one of the two", loss=loss_of(bench, path)) for path in models]
            for name, recipe in recipes.items():
                rows.append(add(name=name, loss=merged(bench, models, text, recipe)))
                print(rows[-1], flush=True)
    record.finish({"rows": rows})
    RESULT.write_text(record.to_json())


if __name__ == "__main__":
    main()
