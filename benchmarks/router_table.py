"""Routers and balance rules trained on the same tokens with the same active compute.

    python benchmarks/router_table.py --data DATA --work DIR [--seconds 1000] [--only NAME ...]

DATA is the folder that babel was trained on. Every row of `router_cases` is trained by moekit's own
trainer on about a million tokens, once a seed; a seed gives all rows the same windows in the same
order, and all runs are measured on the same held-out windows. Initial weights differ where the
parts do. Goes on where it stopped; writes benchmarks/results/router_table.json when complete, or
with --publish what there is.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from resumable import Done, OutOfTime
from router_cases import CASES, EXPERT_WIDTH, STEPS, TOP_K, Case
from small_training import HELD_OUT, LENGTH, MICRO, VOCAB, WINDOWS, Texts, training

from moekit.core.record import start_record
from moekit.train.recipe import Recipe, recipe_from_dict

RESULT = Path(__file__).parent / "results" / "router_table.json"
SEEDS = (0, 1, 2)
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
    model = {**MODEL, "moe": case.moe}
    fixed = training(STEPS, seed)
    return recipe_from_dict({"name": case.name, "model": model, "balance": case.balance, **fixed})


def run(texts: Texts, case: Case, seed: int) -> dict[str, Any]:
    """Train one row and measure it on the held-out windows."""
    model, entries, seconds = texts.train(recipe_of(case, seed))
    loss, routings = texts.held_out_loss(model, STEPS)
    found: dict[str, Any] = {"loss": loss}
    if routings:
        # In SwiGLU experts of the usual width.
        work = sum(float((routing.counts() * routing.cost).sum()) for routing in routings)
        layers = {routing.layer for routing in routings}
        usual = 3 * WIDTH * EXPERT_WIDTH * HELD_OUT * LENGTH * len(layers)
        found["experts_a_token"] = work / usual
    late = [entry["routers"] for entry in entries[-10:] if "routers" in entry]
    if late:
        by_layer = [sum(e["imbalance"]) / len(e["imbalance"]) for e in late]
        found |= {"imbalance": sum(by_layer) / len(late), "dead": late[-1]["dead"]}
    return {
        **found,
        "parameters": sum(param.numel() for param in model.parameters()),
        "cpu_ms_per_step": 1000 * seconds / STEPS,
        "curve": [entry["loss"] for entry in entries if "loss" in entry][4::5],
    }


def shared_work(case: Case) -> float:
    """What experts that every token goes through compute, in experts of the usual width."""
    shared = (case.moe or {}).get("shared")
    return shared["expert_width"] / EXPERT_WIDTH if shared else 0.0


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
    texts = Texts(given.data, given.work)
    wanted = [case for case in CASES if not given.only or case.name in given.only]
    rows, complete = [], True
    try:
        for seed in SEEDS:
            for case in wanted:
                # What a row is, is part of its key: a changed recipe is trained again.
                key = json.dumps([case.name, case.moe, case.balance, seed])
                found = done.of(key, lambda c=case, s=seed: run(texts, c, s))
                row = {"name": case.name, "causal": case.causal, "seed": seed, **found}
                if "experts_a_token" in found:
                    row["experts_a_token"] += shared_work(case)
                rows.append(row)
    except OutOfTime:
        complete = False
        print(f"{len(done.found)} runs are done; call again to go on")
        if not given.publish:
            return
    record.finish({"model": MODEL, "rows": rows, "complete": complete})
    RESULT.write_text(record.to_json())


if __name__ == "__main__":
    main()
