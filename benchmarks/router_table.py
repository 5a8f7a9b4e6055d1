"""Routers and balance rules trained on the same tokens with the same active compute.

    python benchmarks/router_table.py --data DATA --work DIR [--seconds 1000] [--only NAME ...]

DATA is the folder that babel was trained on. Every row of `router_cases` is trained by moekit's own
trainer on about a million tokens, once a seed; a seed gives all rows the same weights outside the
experts' layers, the same windows in the same order, and the same held-out windows. Goes on where it
stopped; writes benchmarks/results/router_table.json when complete, or with --publish what there is.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from resumable import Done, OutOfTime
from router_cases import CASES, EXPERT_WIDTH, STEPS, TOP_K, Case

from moekit.core.record import start_record
from moekit.layers import RouterContext
from moekit.train.data import PackedMix, mixing_weights, read_domains, tokenize_domains
from moekit.train.distributed import World
from moekit.train.loop import train
from moekit.train.model import build_model
from moekit.train.recipe import Recipe, recipe_from_dict
from moekit.train.run import Run
from moekit.train.tokenizer import train_tokenizer

RESULT = Path(__file__).parent / "results" / "router_table.json"
SEEDS = (0, 1, 2)
VOCAB, LENGTH, WINDOWS, MICRO = 1024, 256, 16, 8
HELD_OUT = 192
ALONE = World(0, 1, torch.device("cpu"))
WIDTH = 96
MODEL = {
    **{"model_type": "moekit", "hidden_size": WIDTH, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24},
    **{
        "intermediate_size": TOP_K * EXPERT_WIDTH,
        "max_position_embeddings": LENGTH,
        "tie_word_embeddings": True,
    },
}


def recipe_of(case: Case, seed: int) -> Recipe:
    return recipe_from_dict(
        {
            "name": case.name,
            "model": {**MODEL, "moe": case.moe},
            "tokenizer": {"vocab_size": VOCAB},
            "optim": {"name": "adamw", "lr": 4e-3, "embedding_lr": 4e-3, "warmup_steps": 20},
            "balance": case.balance,
            "train": {
                **{"tokens": STEPS * WINDOWS * LENGTH, "seq_len": LENGTH, "seed": seed},
                **{"batch_windows": WINDOWS, "micro_windows": MICRO, "precision": "fp32"},
                **{"eval_every": 0, "checkpoint_every": 10**9, "log_every": 5},
            },
        }
    )


class Bench:
    """The texts as tokens, and what a run needs of them."""

    def __init__(self, data: Path, work: Path) -> None:
        self.work = work
        texts = read_domains(data, "*.train.jsonl")
        saved = work / "tokenizer"
        if not saved.is_dir():
            train_tokenizer(texts, VOCAB, 300_000).save_pretrained(saved)
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(saved)
        end = self.tokenizer.eos_token_id
        # A million tokens of 15 domains is a fifth of what there is of the smallest.
        short = {name: docs[: max(1, len(docs) // 3)] for name, docs in texts.items()}
        self.domains = tokenize_domains(short, self.tokenizer, end)
        valid = tokenize_domains(read_domains(data, "*.valid.jsonl"), self.tokenizer, end)
        held = PackedMix(valid, mixing_weights(valid, None, 0.7), LENGTH, 0)
        self.held_out = torch.from_numpy(held.batch(range(HELD_OUT))[0])

    def run(self, case: Case, seed: int) -> dict[str, Any]:
        """Train one row and measure it on the held-out windows."""
        recipe = recipe_of(case, seed)
        # The folder is this process's: two may work on different rows.
        folder = self.work / f"run-{os.getpid()}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        weights = mixing_weights(self.domains, None, recipe.data.exponent)
        mix = PackedMix(self.domains, weights, LENGTH, seed)
        model = build_model(recipe, len(self.tokenizer), self.tokenizer.eos_token_id)
        params = sum(param.numel() for param in model.parameters())
        silent = lambda *_: None  # noqa: E731
        run = Run(recipe, folder, ALONE, self.tokenizer, model, mix, [], silent, silent)
        started = time.process_time()
        train(run)
        seconds = time.process_time() - started
        entries = [json.loads(line) for line in (folder / "log.jsonl").open()]
        shutil.rmtree(folder)
        late = [e["routers"] for e in entries[-10:] if "routers" in e]
        routed = {}
        if late:
            by_layer = [sum(e["imbalance"]) / len(e["imbalance"]) for e in late]
            routed = {"imbalance": sum(by_layer) / len(late), "dead": late[-1]["dead"]}
        losses = [e["loss"] for e in entries if "loss" in e]
        return {
            **self.held_out_loss(model),
            **routed,
            "parameters": params,
            "cpu_ms_per_step": 1000 * seconds / STEPS,
            "curve": losses[4::5],
        }

    @torch.no_grad()
    def held_out_loss(self, model: Any) -> dict[str, float]:
        """Nats a token, and the work of its experts in SwiGLU experts of the usual width."""
        model.eval()
        total, pairs, tokens = 0.0, 0.0, 0
        for number, ids in enumerate(self.held_out.split(16)):
            context = RouterContext(len(ids), LENGTH, step=STEPS, seed=number)
            made = model(input_ids=ids[:, :-1], router_context=context, use_cache=False)
            nats = torch.nn.functional.cross_entropy(
                made.logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
            )
            total += float(nats)
            tokens += ids[:, 1:].numel()
            for routing in made.routings or []:
                pairs += float((routing.counts() * routing.cost).sum())
        layers = len(made.routings or [])
        worked = (
            {"experts_a_token": pairs / tokens / layers / (3 * WIDTH * EXPERT_WIDTH)}
            if layers
            else {}
        )
        return {"loss": total / tokens, **worked}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="where tokens are kept")
    parser.add_argument("--only", nargs="+", help="names of rows")
    parser.add_argument("--seconds", type=float, help="stop after so many, to be called again")
    parser.add_argument("--publish", action="store_true", help="write what there is")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    given.work.mkdir(parents=True, exist_ok=True)
    options = {
        "steps": STEPS,
        "windows": WINDOWS,
        "micro": MICRO,
        "length": LENGTH,
        "top_k": TOP_K,
        "vocab": VOCAB,
    }
    deadline = None if given.seconds is None else time.monotonic() + given.seconds
    done = Done(given.work / "router_table.partial.json", options, deadline)
    record = start_record("benchmarks/router_table.py", options, seed=0)
    bench = Bench(given.data, given.work)
    wanted = [case for case in CASES if not given.only or case.name in given.only]
    rows, complete = [], True
    try:
        for seed in SEEDS:
            for case in wanted:
                # What a row is, is part of its key: a changed recipe is trained again.
                key = json.dumps([case.name, case.moe, case.balance, seed])
                found = done.of(key, lambda c=case, s=seed: bench.run(c, s))
                rows.append({"name": case.name, "causal": case.causal, "seed": seed, **found})
    except OutOfTime:
        complete = False
        print(f"{len(done.found)} runs are done; call again to go on")
        if not given.publish:
            return
    record.finish({"model": MODEL, "rows": rows, "complete": complete})
    RESULT.write_text(record.to_json())


if __name__ == "__main__":
    main()
