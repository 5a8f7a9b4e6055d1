"""Growing a MoE beside training it from scratch, at equal compute.

    python benchmarks/upcycle_table.py --data DATA --work DIR [--seconds 1000]

DATA is the folder that babel was trained on. A dense model is trained, fine-tuned on four groups of
domains and upcycled in the ways of `moekit upcycle`; every way ends when it has used as many
multiplications as the dense model's run twice as long, what fine-tunes cost included. A loss is
that of held-out windows of all domains, in nats a token. Goes on where it stopped; writes
benchmarks/results/upcycle_table.json when complete, or with --publish what there is.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from resumable import Done, OutOfTime
from small_training import LENGTH, VOCAB, WINDOWS, Texts, training

import moekit
from moekit.core.record import start_record
from moekit.train.recipe import recipe_from_dict
from moekit.upcycle.run import Request, upcycle

RESULT = Path(__file__).parent / "results" / "upcycle_table.json"
SEEDS = (0, 1, 2)
# Dense steps before upcycling, and what may be used in all, in steps of the dense model.
BASE, BUDGET = 245, 490
BRANCH = 30
WIDTH, LAYERS, FFN = 96, 3, 192
DENSE = {
    **{"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "head_dim": 24, "intermediate_size": FFN},
    **{"max_position_embeddings": LENGTH, "tie_word_embeddings": True},
}
GROUPS = {
    "technical": ("code-python", "math-en"),
    "prose": ("bible-en", "drama-en", "reviews-en", "web-en", "wiki-en", "tech-en"),
    "romance": ("tech-es", "tech-fr", "web-es", "web-fr", "web-pt"),
    "others": ("tech-de", "tech-ja"),
}
AUX = {"rule": "loss", "coefficient": 0.01}
Way = Callable[["Bench", int], tuple[Any, float]]


def moe_config(experts: int) -> dict[str, Any]:
    return {
        **{"model_type": "qwen3_moe", **DENSE, "moe_intermediate_size": FFN},
        **{"num_experts": experts, "num_experts_per_tok": 2, "norm_topk_prob": True},
    }


def relative_cost(ffns: float, attentions: float = 1) -> float:
    """Multiplications of a token beside the dense model's, with so many of its modules active."""
    attention, ffn = LAYERS * 3 * WIDTH * WIDTH, LAYERS * 3 * WIDTH * FFN
    head = WIDTH * VOCAB
    return (attentions * attention + ffns * ffn + head) / (attention + ffn + head)


class Bench:
    def __init__(self, data: Path, work: Path) -> None:
        self.texts, self.work = Texts(data, work), work

    def train(
        self, name: str, model: dict[str, Any], steps: float, seed: int, **more: Any
    ) -> tuple[Any, Path]:
        """A run from a config or a path, and where its model is kept."""
        out = self.work / f"{name}-{seed}"
        # What starts from trained weights starts at a lower rate.
        lr = 2e-3 if "path" in model else 4e-3
        recipe = {"name": name, "model": model, **training(round(steps), seed, lr)}
        domains = more.pop("domains", None)
        made = self.texts.train(recipe_from_dict({**recipe, **more}), domains)[0]
        made.save_pretrained(out)
        self.texts.tokenizer.save_pretrained(out)
        return made, out

    def kept(self, name: str, seed: int, make: Callable[[], Any]) -> Path:
        """A model that several ways start from, trained once."""
        out = self.work / f"{name}-{seed}"
        if not (out / "tokenizer.json").exists():
            make()
        return out

    def base(self, seed: int) -> Path:
        model = {"model_type": "qwen3", **DENSE}
        return self.kept("base", seed, lambda: self.train("base", model, BASE, seed))

    def branches(self, seed: int) -> list[Path]:
        found = []
        for name, domains in GROUPS.items():
            start = {"path": str(self.base(seed))}

            def branch(name: str = name, domains: Any = domains, start: Any = start) -> None:
                self.train(f"branch-{name}", start, BRANCH, seed, domains=domains)

            found.append(self.kept(f"branch-{name}", seed, branch))
        return found

    def grown(self, request: Request, seed: int) -> Path:
        out = self.work / f"grown-{seed}"
        shutil.rmtree(out, ignore_errors=True)
        upcycle(request, out, seed=seed, overwrite=True)
        return out


def dense(bench: Bench, seed: int) -> tuple[Any, float]:
    model = {"model_type": "qwen3", **DENSE}
    return bench.train("dense", model, BUDGET, seed)[0], BUDGET


def dense_continued(bench: Bench, seed: int) -> tuple[Any, float]:
    start = {"path": str(bench.base(seed))}
    return bench.train("continued", start, BUDGET - BASE, seed)[0], BUDGET


def scratch(experts: int) -> Way:
    def way(bench: Bench, seed: int) -> tuple[Any, float]:
        steps = BUDGET / relative_cost(2)
        model = bench.train("scratch", moe_config(experts), steps, seed, balance=AUX)[0]
        return model, BUDGET

    return way


def from_base(method: str, active: float = 2, **options: Any) -> Way:
    """Upcycle the base, train what is left of the budget."""

    def way(bench: Bench, seed: int) -> tuple[Any, float]:
        request = Request(method, str(bench.base(seed)), options=options)
        start = {"path": str(bench.grown(request, seed))}
        steps = (BUDGET - BASE) / relative_cost(active)
        return bench.train("trained", start, steps, seed, balance=AUX)[0], BUDGET

    return way


def from_branches(method: str, cost: float, **options: Any) -> Way:
    """Upcycle the four fine-tunes, whose cost is taken from what is left."""

    def way(bench: Bench, seed: int) -> tuple[Any, float]:
        others = tuple(map(str, bench.branches(seed)))
        request = Request(method, str(bench.base(seed)), others, options=options)
        left = BUDGET - BASE - BRANCH * len(others)
        start = {"path": str(bench.grown(request, seed))}
        return bench.train("trained", start, left / cost, seed, balance=AUX)[0], BUDGET

    return way


def expert_upcycling(bench: Bench, seed: int) -> tuple[Any, float]:
    """Four experts for half of the budget, then eight."""
    half = BUDGET / 2 / relative_cost(2)
    small = bench.train("small", moe_config(4), half, seed, balance=AUX)[1]
    request = Request("expert-upcycling", str(small), options={"experts": 8, "utility": "uniform"})
    start = {"path": str(bench.grown(request, seed))}
    return bench.train("trained", start, half, seed, balance=AUX)[0], BUDGET


def untrained(method: str, **options: Any) -> Way:
    """The fine-tunes brought together, and nothing trained after."""

    def way(bench: Bench, seed: int) -> tuple[Any, float]:
        others = tuple(map(str, bench.branches(seed)))
        request = Request(method, str(bench.base(seed)), others, options=options)
        model = moekit.load_language_model(bench.grown(request, seed), dtype="float32").model
        return model, BASE + BRANCH * len(others)

    return way


WAYS: dict[str, Way] = {
    "dense from scratch": dense,
    "dense, continued": dense_continued,
    "MoE of 4 from scratch": scratch(4),
    "MoE of 8 from scratch": scratch(8),
    "sparse upcycling, 4": from_base("sparse", experts=4, top_k=2),
    "drop upcycling, 4": from_base("drop", experts=4, top_k=2, reinit=0.5),
    "slices, 8 of half width": from_base("virtual-groups", 1, experts=8, slices=2, top_k=2),
    "Branch-Train-MiX, 4": from_branches("btx", relative_cost(2), top_k=2),
    # The base and four fine-tunes: every attention runs, one FFN does.
    "BAM, 5": from_branches("bam", relative_cost(1, attentions=5)),
    "expert upcycling, 4 to 8": expert_upcycling,
    "Branch-Train-MiX, no training": untrained("btx", top_k=2),
    "Branch-Train-Merge": untrained("branch-train-merge"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="where models are kept")
    parser.add_argument("--only", nargs="+", help="names of rows")
    parser.add_argument("--seconds", type=float, help="stop after so many, to be called again")
    parser.add_argument("--publish", action="store_true", help="write what there is")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    given.work.mkdir(parents=True, exist_ok=True)
    options = {"base": BASE, "budget": BUDGET, "branch": BRANCH, "tokens": WINDOWS * LENGTH}
    deadline = None if given.seconds is None else time.monotonic() + given.seconds
    done = Done(given.work / "upcycle_table.partial.json", options, deadline)
    record = start_record("benchmarks/upcycle_table.py", options, seed=0)
    bench = Bench(given.data, given.work)

    def measured(way: Way, seed: int) -> dict[str, Any]:
        model, cost = way(bench, seed)
        params = sum(param.numel() for param in model.parameters())
        loss = bench.texts.held_out_loss(model)[0]
        return {"loss": loss, "dense_steps": cost, "parameters": params}

    rows, complete = [], True
    try:
        for seed in SEEDS:
            for name, way in WAYS.items():
                if not given.only or name in given.only:
                    found = done.of(f"{name}, {seed}", lambda w=way, s=seed: measured(w, s))
                    rows.append({"name": name, "seed": seed, **found})
    except OutOfTime:
        complete = False
        print(f"{len(done.found)} parts are done; call again to go on")
        if not given.publish:
            return
    record.finish({"model": DENSE, "rows": rows, "complete": complete})
    RESULT.write_text(record.to_json())


if __name__ == "__main__":
    main()
