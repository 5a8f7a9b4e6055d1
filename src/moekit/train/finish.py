"""The end of a run: a model directory with its card, log and probes, under its final name."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from moekit.core.find import find_moe
from moekit.core.record import FileHash, RunRecord
from moekit.layers import MoekitForCausalLM
from moekit.layers.stock import stock_family, to_stock

from .run import Run


def finish(
    run: Run, out: Path, score: dict[str, Any], last: dict[str, Any], record: RunRecord
) -> Path:
    """Write the model in bf16 with its tokenizer, card, log and probes, and rename it to `out`.

    A model of moekit's layers that equals a stock family is written as that family.
    `score` is the evaluation on the whole validation text and `last` the last log entry; `record`
    is completed and saved beside the weights. The unfinished run's folder is removed only after
    `out` stands.
    """
    target = run.folder / "model"
    shutil.rmtree(target, ignore_errors=True)
    # Names of how training computed; another machine computes in its own way.
    run.model.set_attn_implementation("sdpa")
    if isinstance(run.model, MoekitForCausalLM) and stock_family(run.model):
        run.model = to_stock(run.model)
        run.say(f"written as {run.model.config.model_type}, which computes the same")
    if find_moe(run.model) and not isinstance(run.model, MoekitForCausalLM):
        run.model.set_experts_implementation("grouped_mm")
    run.model.to(torch.bfloat16).save_pretrained(target)
    run.tokenizer.save_pretrained(target)
    training = target / "training"
    training.mkdir()
    shutil.copy(run.folder / "log.jsonl", training)
    (training / "recipe.json").write_text(json.dumps(run.recipe.to_dict(), indent=1))
    (training / "evaluation.json").write_text(json.dumps(score, indent=1))
    for name in ("probes", "tensorboard"):
        if (run.folder / name).is_dir():
            shutil.copytree(run.folder / name, training / name)
    (target / "README.md").write_text(model_card(run, score, last), encoding="utf-8")
    files = [FileHash.of(file, file.name) for file in sorted(target.iterdir()) if file.is_file()]
    record.finish({"last": last, "valid": score}, files).save(target)
    for file in target.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    target.rename(out)
    shutil.rmtree(run.folder)
    return out


def model_card(run: Run, score: dict[str, Any], last: dict[str, Any]) -> str:
    """The README of a trained model: what it is, what it saw and how well it predicts."""
    recipe = run.recipe
    total = sum(param.numel() for param in run.model.parameters())
    lines = [
        f"# {recipe.name}",
        "",
        f"A {run.model.config.model_type} language model of {total:,} parameters, trained by "
        f"moekit on {last['tokens']:,} tokens (seed {recipe.train.seed}). The recipe, the log and "
        "probe traces of its routing are in `training/`.",
        "",
        "| domain | training tokens in an epoch | share of the mix | bits per byte (valid) |",
        "|---|---|---|---|",
    ]
    for domain, weight in zip(run.mix.domains, run.mix.weights, strict=True):
        bits = score["by_domain"].get(domain.name)
        cell = f"{bits:.3f}" if bits is not None else ""
        lines.append(f"| {domain.name} | {len(domain.tokens):,} | {weight:.3f} | {cell} |")
    if score["by_domain"]:
        lines.append(f"| mean | | | {score['mean']:.3f} |")
    if "routers" in last:
        lines += ["", f"Experts without a token in the last log window: {last['routers']['dead']}."]
    return "\n".join(lines) + "\n"
