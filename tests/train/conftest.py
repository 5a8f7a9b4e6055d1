"""A small run: four layers of code and prose, a tiny recipe, and the command that trains it."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import yaml

from tests.cli.conftest import moekit  # noqa: F401

ROOT = Path(__file__).parents[2]
MOE = {
    "model_type": "qwen3_moe",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 64,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
    "max_position_embeddings": 64,
}
DENSE = {k: v for k, v in MOE.items() if "expert" not in k and k != "norm_topk_prob"}
DENSE = {**DENSE, "model_type": "qwen3"}
DENSE.pop("moe_intermediate_size")


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> Path:
    """A folder with two domains, each with a train and a valid split of this package's files."""
    folder = tmp_path_factory.mktemp("texts")
    sources = {"code": sorted((ROOT / "src").rglob("*.py")), "prose": sorted(ROOT.glob("LICENSE"))}
    for name, files in sources.items():
        text = "".join(file.read_text() for file in files)[:60_000]
        pieces = [text[start : start + 2000] for start in range(0, len(text), 2000)]
        for split, part in (("train", pieces[:-2]), ("valid", pieces[-2:])):
            lines = "".join(json.dumps({"text": piece}) + "\n" for piece in part)
            (folder / f"{name}.{split}.jsonl").write_text(lines)
    return folder


def write_recipe(folder: Path, **sections: dict | None) -> Path:
    """A recipe in `folder` for a run of seconds; a model of None is the dense one.

    A model with its own `model_type` stands alone; other values change what the others hold.
    """
    raw = {
        "name": "tiny",
        "model": MOE,
        "tokenizer": {"vocab_size": 384, "bytes_per_domain": 20_000},
        "optim": {"name": "muon", "warmup_steps": 2, "decay": 0.5},
        "train": {
            **{"tokens": 8 * 4 * 32, "seq_len": 32, "batch_windows": 4, "micro_windows": 2},
            **{"log_every": 1, "eval_every": 0, "checkpoint_every": 3, "eval_context": 32},
            "precision": "fp32",
        },
    }
    for section, values in sections.items():
        if section == "model" and (values is None or "model_type" in values):
            raw[section] = DENSE if values is None else values
        else:
            raw[section] = {**raw.get(section, {}), **(values or {})}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


@pytest.fixture
def recipe(tmp_path):
    return partial(write_recipe, tmp_path)


def command(recipe: Path, texts: Path, out: Path, *extra: str, processes: int = 1) -> list[str]:
    """The command line of a training run, under torchrun for several processes."""
    start = [sys.executable, "-m"]
    if processes > 1:
        start += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    return [
        *start,
        *("moekit", "train", str(recipe), "--data", str(texts), "--out", str(out)),
        *("--device", "cpu", "--threads", "1", *extra),
    ]


def run(*args, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(command(*args, **kwargs), capture_output=True, text=True, timeout=300)


def losses(out: Path) -> list[float]:
    """The losses of every step in a run's log."""
    log = out / "training" / "log.jsonl"
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    return [entry["loss"] for entry in entries if "loss" in entry]
