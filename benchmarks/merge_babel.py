"""Domain fine-tunes of babel merged by every method, and what each domain then costs.

    python benchmarks/merge_babel.py --data DATA --work DIR [--seconds 100] [--only linear,ties]

DATA is the folder that babel was trained on (DOMAIN.train.jsonl and DOMAIN.valid.jsonl). For every
seed babel is fine-tuned on code, mathematics and two languages, each with its own documents; all
four are merged by every method with its defaults, and bits per byte are taken on `valid` of the
four domains and of the others together. Fine-tunes stay in DIR. Interrupted, or ended by
--seconds, it goes on where it stopped and at the end writes benchmarks/results/merge_babel.json.
"""

from __future__ import annotations

import argparse
import functools
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from resumable import Done, OutOfTime
from torch.nn import functional

import moekit
from moekit.core.load import BABEL_PATH
from moekit.core.model_files import side_files
from moekit.core.record import start_record
from moekit.core.seeds import generator
from moekit.evaluate.bits_per_byte import bits_per_byte
from moekit.evaluate.sequences import sequences
from moekit.evaluate.text import limit_bytes_per_domain, read_texts, shuffled
from moekit.merge.recipe import merge_from_dict
from moekit.merge.run import run_recipe
from moekit.profile import align_weights

RESULT = Path(__file__).parent / "results" / "merge_babel.json"
PARTIAL = RESULT.with_suffix(".partial.json")
SEEDS = (0, 1, 2)
DOMAINS = ("code-python", "math-en", "tech-de", "tech-es")
OTHERS = "others"
CONTEXT = 256
# Of a fine-tune: sequences of a step, and the learning rate it begins with.
BATCH, RATE = 8, 2e-4
# Tokens of each domain for methods that learn from text; steps and merges of those that search.
CALIBRATION, LEARNING, BUDGET = 4096, 24, 24

Parameters = dict[str, Any]
TIES = {"weight": 1.0, "density": 0.2}
# label -> (method, parameters of every model, keys of the recipe)
CELLS: dict[str, tuple[str, Parameters, Parameters]] = {
    "linear": ("linear", {"weight": 1.0}, {}),
    "task_arithmetic 0.3": ("task_arithmetic", {"weight": 0.3}, {}),
    "task_arithmetic 1.0": ("task_arithmetic", {"weight": 1.0}, {}),
    "ties (mergekit)": ("ties", TIES, {}),
    "ties (paper)": ("ties", TIES, {"dialect": "paper"}),
    "ties without trimming": ("ties", {"weight": 1.0, "density": 1.0}, {}),
    "dare_linear": ("dare_linear", {"weight": 0.3, "density": 0.5}, {"dialect": "paper"}),
    "dare_ties": ("dare_ties", {"weight": 1.0, "density": 0.5}, {"dialect": "paper"}),
    "della": ("della", {"weight": 1.0, "density": 0.5}, {"dialect": "paper"}),
    "della_linear": ("della_linear", {"weight": 0.3, "density": 0.5}, {"dialect": "paper"}),
    "breadcrumbs": ("breadcrumbs", {"weight": 0.5, "density": 0.9, "gamma": 0.05}, {}),
    "breadcrumbs_ties": ("breadcrumbs_ties", {"weight": 0.5, "density": 0.9, "gamma": 0.05}, {}),
    "sce": ("sce", {}, {"parameters": {"select_topk": 0.1}}),
    "varm": ("varm", {}, {}),
    "pcb": ("pcb", {}, {}),
    "widen": ("widen", {}, {}),
    "ram": ("ram", {}, {}),
    "ramplus_tl": ("ramplus_tl", {}, {}),
    "multislerp": ("multislerp", {"weight": 1.0}, {}),
    "karcher": ("karcher", {}, {}),
    "model_stock": ("model_stock", {}, {}),
    "tsv_m": ("tsv_m", {}, {}),
    "r_tsvm": ("r_tsvm", {}, {}),
    "iso_c": ("iso_c", {}, {}),
    "iso_cts": ("iso_cts", {}, {}),
    "knots": ("knots", {"weight": 0.5}, {}),
    "fisher": ("fisher", {}, {}),
    "regmean": ("regmean", {}, {}),
    "sens": ("sens", {}, {}),
    "adamerging (entropy)": ("adamerging", {}, {"parameters": {"steps": LEARNING, "batch": 2}}),
    "adamerging (cross-entropy)": (
        "adamerging",
        {},
        {"parameters": {"steps": LEARNING, "batch": 2, "lr": 0.01, "loss": "cross-entropy"}},
    ),
    "fw_hard": ("fw_hard", {}, {"parameters": {"batch": 4}}),
    "fw_soft": (
        "fw_soft",
        {},
        {
            "parameters": {
                "steps": 2,
                "inner_steps": LEARNING // 2,
                "batch": 2,
                "lr": 0.01,
                "loss": "cross-entropy",
            }
        },
    ),
    "search of linear": ("linear", {"weight": 1.0}, {"search": {"budget": BUDGET}}),
    "search of task_arithmetic": (
        "task_arithmetic",
        {"weight": 0.3},
        {"search": {"budget": BUDGET}},
    ),
}
# Methods that need no base refuse one that is named only for them.
WITHOUT_BASE = ("linear", "karcher", "multislerp", "fisher", "regmean")


class Bench:
    """babel, the text of the domains, and the fine-tunes in `work`."""

    def __init__(self, data: Path, work: Path, size: int, steps: int) -> None:
        self.data, self.work, self.steps = data, work, steps
        self.valid = limit_bytes_per_domain(read_texts(sorted(data.glob("*.valid.jsonl"))), size)
        self.tokenizer = moekit.load("babel").tokenizer

    def tuned(self, domain: str, seed: int) -> Path:
        """The directory of one fine-tune, trained if it is not there."""
        place = self.work / f"{domain}-{seed}-{self.steps}"
        if not (place / "config.json").is_file():
            self._train(domain, seed, place)
        return place

    def _train(self, domain: str, seed: int, place: Path) -> None:
        model: Any = moekit.load("babel", dtype="float32").model
        documents = shuffled(read_texts(self.data / f"{domain}.train.jsonl"), seed)
        wanted = self.steps * BATCH * CONTEXT
        found = [ids for ids, _ in sequences(self.tokenizer, documents, CONTEXT, wanted)]
        whole = torch.tensor([ids for ids in found if len(ids) == CONTEXT])
        draw = generator(seed, f"merge_babel {domain}")
        optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, self.steps)
        model.train()
        for _ in range(self.steps):
            ids = whole[torch.randint(len(whole), (BATCH,), generator=draw)]
            logits = model(input_ids=ids).logits[:, :-1].float()
            loss = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        partial = place.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        model.eval().save_pretrained(partial)
        for name, path in side_files(BABEL_PATH)[0].items():
            if not (partial / name).exists():
                shutil.copy(path, partial / name)
        partial.replace(place)

    def merged(self, label: str, seed: int) -> dict[str, Any]:
        """Bits per byte by domain of one merge, and the seconds it took."""
        method, per_model, keys = CELLS[label]
        models = [
            {
                "model": str(self.tuned(domain, seed)),
                "data": str(self.data / f"{domain}.train.jsonl"),
                "parameters": per_model,
            }
            for domain in DOMAINS
        ]
        text = {"max_tokens": CALIBRATION, "seq_len": CONTEXT}
        recipe = {"merge_method": method, "models": models, "data": text, "dtype": "float32"}
        if method not in WITHOUT_BASE:
            recipe["base_model"] = "babel"
        out = self.work / "merged"
        shutil.rmtree(out, ignore_errors=True)
        started = time.monotonic()
        run_recipe([merge_from_dict({**recipe, **keys})], out, seed=seed, restart=True)
        seconds = time.monotonic() - started
        return {"seconds": round(seconds, 1), "by_domain": self.measure(out)}

    def measure(self, model: Path | str) -> dict[str, float]:
        """Bits per byte of the four domains, and the mean of all others."""
        network = moekit.load(model, dtype="float32").model
        align_weights(network)
        found = bits_per_byte(
            network, self.tokenizer, self.valid, context=CONTEXT, stride=CONTEXT, batch_size=4
        ).per_domain
        others = [loss.bpb for name, loss in found.items() if name not in DOMAINS]
        return {name: found[name].bpb for name in DOMAINS} | {OTHERS: sum(others) / len(others)}


def work(bench: Bench, done: Done, wanted: list[str], write: bool) -> dict[str, Any]:
    """Everything, or with `write` what is there; raises OutOfTime when the time is over."""
    metrics: dict[str, Any] = {"base": done.of("base", lambda: bench.measure("babel"))}
    metrics |= {"tuned": [], "merged": []}

    def add(name: str, label: dict[str, Any], compute: Callable[[], Any]) -> None:
        key = " ".join([name, *map(str, label.values())])
        if key in done.found or not write:
            metrics[name].append({**label, **done.of(key, compute)})

    for seed in SEEDS:
        for domain in DOMAINS:
            measure = functools.partial(lambda d, s: bench.measure(bench.tuned(d, s)), domain, seed)
            add(
                "tuned",
                {"domain": domain, "seed": seed},
                lambda m=measure: {"by_domain": m()},
            )
        for label in wanted:
            add(
                "merged",
                {"method": label, "seed": seed},
                functools.partial(bench.merged, label, seed),
            )
    return metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="where the fine-tunes are kept")
    parser.add_argument("--bytes", type=int, default=2000, help="of each domain of valid")
    parser.add_argument("--steps", type=int, default=60, help="of a fine-tune")
    parser.add_argument("--only", help="these methods, by comma")
    parser.add_argument("--seconds", type=float, help="stop after so many, to be called again")
    parser.add_argument("--write", action="store_true", help="write the results there are")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    options = {
        **{"bytes": arguments.bytes, "context": CONTEXT, "steps": arguments.steps, "batch": BATCH},
        **{"rate": RATE, "calibration": CALIBRATION, "learning": LEARNING, "budget": BUDGET},
    }
    deadline = time.monotonic() + arguments.seconds if arguments.seconds else None
    done = Done(PARTIAL, options, deadline)
    record = start_record("benchmarks/merge_babel.py", options, seed=0)
    arguments.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(arguments.data, arguments.work, arguments.bytes, arguments.steps)
    wanted = arguments.only.split(",") if arguments.only else list(CELLS)
    try:
        record.finish(work(bench, done, wanted, arguments.write))
    except OutOfTime:
        print(f"{len(done.found)} parts are done; call again to go on")
        return
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(record.to_json())
    if not arguments.write:
        PARTIAL.unlink()


if __name__ == "__main__":
    main()
