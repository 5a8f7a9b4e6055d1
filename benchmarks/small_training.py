"""Short runs of moekit's trainer on babel's texts, many of them in one process: what they share."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from moekit.layers import RouterContext
from moekit.train.data import PackedMix, mixing_weights, read_domains, tokenize_domains
from moekit.train.distributed import World
from moekit.train.loop import train
from moekit.train.model import build_model
from moekit.train.recipe import Recipe
from moekit.train.run import Run
from moekit.train.tokenizer import train_tokenizer

VOCAB, LENGTH, WINDOWS, MICRO = 1024, 128, 32, 32
EXPONENT = 0.7
HELD_OUT = 384
ALONE = World(0, 1, torch.device("cpu"))


def training(steps: int, seed: int, lr: float = 4e-3) -> dict[str, Any]:
    """The sections of a recipe that all runs have in common."""
    return {
        "tokenizer": {"vocab_size": VOCAB},
        # So few steps reach little with AdamW: 4.7 nats where Muon and these rates reach 3.7.
        "optim": {
            **{"name": "muon", "lr": lr, "muon_lr": 5 * lr, "embedding_lr": 10 * lr},
            **{"warmup_steps": 20, "decay": 0.6},
        },
        "train": {
            **{"tokens": steps * WINDOWS * LENGTH, "seq_len": LENGTH, "seed": seed},
            **{"batch_windows": WINDOWS, "micro_windows": MICRO, "precision": "fp32"},
            **{"eval_every": 0, "checkpoint_every": 10**9, "log_every": 5},
        },
    }


class Texts:
    """The texts of a folder as tokens of a small vocabulary, kept in `work`, and held-out windows
    of `valid`."""

    def __init__(self, data: Path, work: Path) -> None:
        self.work = work
        texts = read_domains(data, "*.train.jsonl")
        saved = work / "tokenizer"
        if not saved.is_dir():
            train_tokenizer(texts, VOCAB, 300_000).save_pretrained(saved)
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(saved)
        end = self.tokenizer.eos_token_id
        # A run sees a fraction of it.
        short = {name: docs[: max(1, len(docs) // 3)] for name, docs in texts.items()}
        self.domains = tokenize_domains(short, self.tokenizer, end)
        valid = tokenize_domains(read_domains(data, "*.valid.jsonl"), self.tokenizer, end)
        held = PackedMix(valid, mixing_weights(valid, None, EXPONENT), LENGTH, 0)
        self.held_out = torch.from_numpy(held.batch(range(HELD_OUT))[0])

    def train(
        self, recipe: Recipe, domains: tuple[str, ...] | None = None
    ) -> tuple[Any, list[dict[str, Any]], float]:
        """The trained model, the entries of its log and the seconds of processor time, on all
        domains or the named ones."""
        # The folder is this process's: two may work on different runs.
        folder = self.work / f"run-{os.getpid()}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        chosen = [d for d in self.domains if domains is None or d.name in domains]
        weights = mixing_weights(chosen, None, EXPONENT)
        mix = PackedMix(chosen, weights, LENGTH, recipe.train.seed)
        model = build_model(recipe, len(self.tokenizer), self.tokenizer.eos_token_id)

        def silent(*_: object) -> None:
            pass

        run = Run(recipe, folder, ALONE, self.tokenizer, model, mix, [], silent, silent)
        started = time.process_time()
        train(run)
        seconds = time.process_time() - started
        entries = [json.loads(line) for line in (folder / "log.jsonl").open()]
        shutil.rmtree(folder)
        return model, entries, seconds

    @torch.no_grad()
    def held_out_loss(self, model: Any, step: int = 0) -> tuple[float, list[Any]]:
        """Nats a token, and the routings of moekit's own layers."""
        model.eval()
        total, tokens, routings = 0.0, 0, []
        for number, ids in enumerate(self.held_out.split(32)):
            given: dict[str, Any] = {}
            if model.config.model_type == "moekit":
                given["router_context"] = RouterContext(len(ids), LENGTH, step=step, seed=number)
            made = model(input_ids=ids[:, :-1], use_cache=False, **given)
            nats = torch.nn.functional.cross_entropy(
                made.logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
            )
            total += float(nats)
            tokens += ids[:, 1:].numel()
            routings += getattr(made, "routings", None) or []
        return total / tokens, routings
