"""Fine-tunes joined by moekit and by mergekit-moe from the same recipe: weights, routes and loss.

    python benchmarks/upcycle_peers.py --data DATA --work DIR --mergekit VENV/bin/python

DATA and DIR are those of upcycle_table.py, whose dense model and four fine-tunes on groups of
domains are used (and trained if they are not there). Both tools get one YAML with prompts from
documents of each group's `train`. All weights but the router's must be equal bit for bit, which is
checked before anything is written; then, without any training: held-out loss over all domains, and
the share of tokens of `valid` whose first expert is that of their group. Writes
benchmarks/results/upcycle_peers.json.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch
import yaml
from small_training import LENGTH
from transformers import AutoModelForCausalLM
from upcycle_table import GROUPS, SEEDS, Bench

from moekit.core.record import start_record
from moekit.train.data import read_domains
from moekit.upcycle.moe_recipe import load_moe_recipe
from moekit.upcycle.run import upcycle

RESULT = Path(__file__).parent / "results" / "upcycle_peers.json"
MODES = ("hidden", "hidden_avg", "cheap_embed", "random")
PROMPTS, CHARACTERS, WINDOWS = 12, 240, 30

MERGEKIT = """
import sys, torch, yaml
from mergekit.moe.config import MoEMergeConfig
from mergekit.options import MergeOptions
from mergekit.scripts.moe import build
torch.manual_seed(int(sys.argv[3]))
config = MoEMergeConfig.model_validate(yaml.safe_load(open(sys.argv[1])))
build(config, sys.argv[2], MergeOptions(device="cpu", quiet=True), device="cpu")
"""


def prompts(texts: dict[str, list[str]], domains: tuple[str, ...]) -> list[str]:
    """Beginnings of documents, the domains in turn."""
    chosen = [texts[domains[n % len(domains)]][n // len(domains)] for n in range(PROMPTS)]
    return [text[:CHARACTERS] for text in chosen]


def windows(tokenizer: Any, texts: dict[str, list[str]], domains: tuple[str, ...]) -> torch.Tensor:
    """Tokens [WINDOWS, LENGTH], equal parts of the domains' beginnings."""
    found = []
    for domain in domains:
        ids = tokenizer(" ".join(texts[domain]), add_special_tokens=False)["input_ids"]
        part = WINDOWS // len(domains)
        found.append(torch.tensor(ids[: part * LENGTH]).view(part, LENGTH))
    return torch.cat(found)


@torch.no_grad()
def own_expert_first(model: Any, by_group: list[torch.Tensor]) -> float:
    """Share of tokens, over layers, whose highest router logit is that of their group."""
    shares = []
    for group, ids in enumerate(by_group):
        logits = model(input_ids=ids, output_router_logits=True).router_logits
        shares += [float((layer.argmax(-1) == group).float().mean()) for layer in logits]
    return sum(shares) / len(shares)


def outside_router(model: Any) -> dict[str, torch.Tensor]:
    return {k: v for k, v in model.state_dict().items() if not k.endswith("mlp.gate.weight")}


def different(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> list[str]:
    if ours.keys() != theirs.keys():
        return sorted(ours.keys() ^ theirs.keys())
    return [name for name in ours if not torch.equal(ours[name], theirs[name])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--mergekit", required=True, help="a Python with mergekit")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    options = {"prompts": PROMPTS, "characters": CHARACTERS, "windows": WINDOWS}
    record = start_record("benchmarks/upcycle_peers.py", options, seed=0)
    bench = Bench(given.data, given.work)
    train = read_domains(given.data, "*.train.jsonl")
    valid = read_domains(given.data, "*.valid.jsonl")
    by_group = [windows(bench.texts.tokenizer, valid, domains) for domains in GROUPS.values()]
    rows = []
    for seed in SEEDS:
        for mode in MODES:
            recipe = given.work / "peers.yaml"
            experts = [
                {"source_model": str(branch), "positive_prompts": prompts(train, domains)}
                for branch, domains in zip(bench.branches(seed), GROUPS.values(), strict=True)
            ]
            fields = {"base_model": str(bench.base(seed)), "gate_mode": mode, "experts": experts}
            fields |= {"architecture": "qwen3", "dtype": "float32"}
            recipe.write_text(yaml.safe_dump(fields))
            outs = {name: given.work / f"peers-{name}" for name in ("moekit", "mergekit")}
            for out in outs.values():
                shutil.rmtree(out, ignore_errors=True)
            upcycle(load_moe_recipe(recipe, to="fused"), outs["moekit"], seed=seed)
            command = [given.mergekit, "-c", MERGEKIT, str(recipe), str(outs["mergekit"])]
            subprocess.run([*command, str(seed)], check=True, capture_output=True)
            models = {
                name: AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
                for name, out in outs.items()
            }
            wrong = different(*(outside_router(model) for model in models.values()))
            if wrong:
                raise SystemExit(f"seed {seed}, {mode}: {len(wrong)} tensors differ: {wrong[:3]}")
            for name, model in models.items():
                found = {
                    "loss": bench.texts.held_out_loss(model)[0],
                    "own_expert_first": own_expert_first(model, by_group),
                }
                rows.append({"seed": seed, "mode": mode, "tool": name, **found})
                print(rows[-1], flush=True)
    record.finish({"groups": len(GROUPS), "rows": rows})
    RESULT.write_text(record.to_json())


if __name__ == "__main__":
    main()
