"""Merging beside mergekit: seconds and peak memory, on a base and two fine-tunes of random weights.

    python benchmarks/merge_speed.py --mergekit VENV/bin/python [--size 1.8GB] [--work /tmp]

makes three bf16 checkpoints of about that size, merges them by `linear` and by `ties` with both
tools, each run in a process of its own whose RssAnon is sampled, and compares the results entry by
entry before any time is written: linear must be equal bit for bit, TIES outside of the entries
whose magnitudes tie at a threshold, of which both tools must keep as many. `--phase` runs one part
(make, moekit, mergekit, check) in a directory that `--work` keeps, so that the parts can be run
when the machine is free.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from convert_memory import measure

from moekit.core.checkpoint import Checkpoint, TensorInfo
from moekit.core.memory import bytes_of, format_bytes
from moekit.core.record import start_record
from moekit.core.seeds import generator
from moekit.core.writer import CheckpointWriter

RESULTS = Path(__file__).parent / "results"
# How far fine-tunes move, beside weights of deviation 0.02.
MOVED, WEIGHTS = 1e-3, 0.02
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "vocab_size": 32_000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "tie_word_embeddings": True,
}
MODELS = ("base", "a", "b")
DENSITY = 0.5
TARGETS = {"linear": 1.5, "ties": 5.0}
MEMORY = 1.5e9

MOEKIT = """
import sys
from pathlib import Path
from moekit.merge.recipe import load_merge
from moekit.merge.run import run_recipe
print("imported", flush=True)
sys.stdin.readline()
run_recipe(load_merge(Path(sys.argv[1])), sys.argv[2])
print("merged", flush=True)
sys.stdin.readline()
"""
MERGEKIT = """
import sys, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
options = MergeOptions(copy_tokenizer=False, quiet=True, write_model_card=False)
recipe = MergeConfiguration.model_validate(yaml.safe_load(open(sys.argv[1])))
print("imported", flush=True)
sys.stdin.readline()
run_merge(recipe, sys.argv[2], options)
print("merged", flush=True)
sys.stdin.readline()
"""


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the checkpoint."""
    width, inner = int(CONFIG["hidden_size"]), int(CONFIG["intermediate_size"])
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (int(CONFIG["vocab_size"]), width)
    }
    for layer in range(layers):
        own = f"model.layers.{layer}."
        found |= {f"{own}self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
        found |= {f"{own}mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
        found[f"{own}mlp.down_proj.weight"] = (width, inner)
        found |= {f"{own}{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    return found | {"model.norm.weight": (width,)}


def layers_for(size: int) -> int:
    one, two = (2 * sum(torch.Size(s).numel() for s in shapes(n).values()) for n in (1, 2))
    return max(1, round((size - one) / (two - one)) + 1)


def make(work: Path, layers: int) -> None:
    """The three checkpoints and the two recipes."""
    infos = {name: TensorInfo(shape, torch.bfloat16) for name, shape in shapes(layers).items()}
    for number, model in enumerate(MODELS):
        with CheckpointWriter(work / model, infos) as writer:
            for name, _ in writer.pending():
                draw = generator(0, f"merge_speed {name}")
                values = torch.randn(infos[name].shape, generator=draw).mul_(WEIGHTS)
                values = values.bfloat16()
                if number:
                    draw = generator(number, f"merge_speed {name}")
                    values += torch.randn(infos[name].shape, generator=draw).mul_(MOVED)
                writer.write(name, values)
            content = CONFIG | {"num_hidden_layers": layers}
            writer.write_file("config.json", json.dumps(content))
            writer.commit()
    paths = {model: str((work / model).resolve()) for model in MODELS}
    recipes: dict[str, dict[str, Any]] = {
        "linear": {
            "merge_method": "linear",
            "models": [
                {"model": paths[model], "parameters": {"weight": weight}}
                for model, weight in zip(MODELS, (0.2, 0.4, 0.4), strict=True)
            ],
        },
        "ties": {
            "merge_method": "ties",
            "base_model": paths["base"],
            "models": [
                {"model": paths[model], "parameters": {"weight": 0.5, "density": DENSITY}}
                for model in MODELS[1:]
            ],
        },
    }
    for name, recipe in recipes.items():
        recipe["dtype"] = "bfloat16"
        (work / f"{name}.yaml").write_text(yaml.safe_dump(recipe))


def differences(one: Path, two: Path) -> dict[str, Any]:
    """Entries that differ between two merged checkpoints, by tensor."""
    found: dict[str, int] = {}
    total = 0
    with Checkpoint(one) as first, Checkpoint(two) as second:
        if set(first.names()) != set(second.names()):
            raise SystemExit("the merged models have other tensors; no result is written")
        for name in first.names():
            a, b = (x.get(name).view(torch.int16) for x in (first, second))
            total += a.numel()
            if not torch.equal(a, b):
                found[name] = int((a != b).sum())
    return {"entries": total, "differ": sum(found.values()), "tensors": len(found), "by": found}


def ties_differences(work: Path, found: dict[str, int]) -> dict[str, Any]:
    """Whether every difference of TIES lies where a magnitude ties at its threshold.

    For each model and tensor the threshold is the magnitude of the last entry that stays.
    """
    outside = 0
    with (
        Checkpoint(work / "base") as base,
        Checkpoint(work / "a") as a,
        Checkpoint(work / "b") as b,
        Checkpoint(work / "moekit-ties") as ours,
        Checkpoint(work / "mergekit-ties") as theirs,
    ):
        for name in found:
            below = base.get(name)
            at_threshold = torch.zeros(below.shape, dtype=torch.bool)
            for model in (a, b):
                size = (model.get(name) - below).abs()
                count = int(DENSITY * size.numel())
                bits = size.view(torch.int16).flatten()
                bound = bits.kthvalue(bits.numel() - count + 1).values
                at_threshold |= (bits == bound).view(below.shape)
            differ = ours.get(name).view(torch.int16) != theirs.get(name).view(torch.int16)
            outside += int((differ & ~at_threshold).sum())
    return {"outside_of_ties": outside}


def run(work: Path, tool: str, python: str, repeats: dict[str, int]) -> dict[str, Any]:
    """Every recipe by one tool, each time in a process of its own."""
    found: dict[str, Any] = {}
    for method, count in repeats.items():
        runs = []
        for _ in range(count):
            out = work / f"{tool}-{method}"
            shutil.rmtree(out, ignore_errors=True)
            code = MOEKIT if tool == "moekit" else MERGEKIT
            runs.append(measure(work / f"{method}.yaml", out, "", code, python))
            print(tool, method, runs[-1], flush=True)
        found[method] = {
            "seconds": statistics.median(one["seconds"] for one in runs),
            "all_seconds": [one["seconds"] for one in runs],
            "above_import": max(one["above_import"] for one in runs),
        }
    return found


def check(work: Path) -> dict[str, Any]:
    """Equality of both tools' results; ends the program where they are not equal as they must."""
    found: dict[str, Any] = {}
    for method in TARGETS:
        found[method] = differences(work / f"moekit-{method}", work / f"mergekit-{method}")
        if method == "ties":
            found[method] |= ties_differences(work, found[method]["by"])
        elif found[method]["differ"]:
            raise SystemExit(f"{method} differs in {found[method]['differ']} entries")
        del found[method]["by"]
    if found["ties"]["outside_of_ties"]:
        raise SystemExit(
            f"ties differs in {found['ties']['outside_of_ties']} entries that no tie explains"
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mergekit", help="python of an environment with mergekit")
    parser.add_argument("--size", default="1.8GB", help="of one checkpoint, such as 8GB")
    parser.add_argument("--work", type=Path, default=Path("/tmp"))
    parser.add_argument("--phase", choices=("make", "moekit", "mergekit", "check"))
    parser.add_argument("--methods", default="linear,ties")
    parser.add_argument(
        "--repeats", type=int, default=3, help="runs of moekit and mergekit's linear"
    )
    arguments = parser.parse_args()
    work = arguments.work / "moekit-merge-speed"
    partial = work / "found.json"
    layers = layers_for(bytes_of(arguments.size))
    wanted = [arguments.phase] if arguments.phase else ["make", "moekit", "mergekit", "check"]
    if "make" in wanted:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        make(work, layers)
    found = json.loads(partial.read_text()) if partial.exists() else {}
    methods = arguments.methods.split(",")
    if "moekit" in wanted:
        repeats = dict.fromkeys(methods, arguments.repeats)
        found.setdefault("moekit", {}).update(run(work, "moekit", sys.executable, repeats))
    if "mergekit" in wanted:
        # TIES takes mergekit minutes, and its spread was 6 %: once is enough.
        repeats = {name: 1 if name == "ties" else arguments.repeats for name in methods}
        found.setdefault("mergekit", {}).update(run(work, "mergekit", arguments.mergekit, repeats))
    partial.write_text(json.dumps(found))
    if "check" in wanted:
        finish(work, arguments.size, found)
        shutil.rmtree(work)


def finish(work: Path, size: str, found: dict[str, Any]) -> None:
    """Check, then write the result."""
    equal = check(work)
    with Checkpoint(work / "base") as base:
        entries, stored = sum(torch.Size(base.shape(n)).numel() for n in base.names()), base.nbytes
    name = "merge_speed" if stored < 4e9 else "merge_speed_large"
    options = {"size": size, "density": DENSITY, "models": len(MODELS)}
    record = start_record("benchmarks/merge_speed.py", options, seed=0)
    ratios = {
        method: found["mergekit"][method]["seconds"] / found["moekit"][method]["seconds"]
        for method in TARGETS
    }
    metrics = {
        **{"parameters": entries, "checkpoint_bytes": stored, "runs": found, "equal": equal},
        **{"ratios": ratios, "targets": TARGETS, "memory_target": MEMORY},
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(record.finish(metrics).to_json())
    for method, ratio in ratios.items():
        peak = found["moekit"][method]["above_import"]
        print(f"{method}: {ratio:.1f} times as fast, {format_bytes(peak)} above import")


if __name__ == "__main__":
    main()
