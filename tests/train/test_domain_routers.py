"""Runs from the command line with routers that balance themselves by losses of their own."""

import json

import pytest
from transformers import AutoModelForCausalLM

from tests.train.test_moekit_layers import MODEL, ON_CPU

MODULES = {
    "type": "stick-breaking",
    "count": 4,
    "top_k": 2,
    "router": {"name": "moduleformer", "score_width": 16},
    "head_width": 8,
}
MONET = {"type": "monet-vertical", "count": 36, "expert_width": 8}
SWIGLU = {"type": "swiglu", "count": 6, "expert_width": 16}
RUNS = {
    "moduleformer": (
        {"router": "moduleformer", "experts": SWIGLU, "moe_attention": MODULES},
        ["mutual-information"],
    ),
    "monet": (
        {
            "router": "monet",
            "experts": MONET,
            "overrides": [{"layers": [1], "router": {"name": "monet", "reuse": True}}],
        },
        ["half-expert-uniformity", "half-expert-ambiguity"],
    ),
    "comet": ({"router": "comet", "experts": SWIGLU}, ["leaf-entropy"]),
    "promoe": ({"router": "promoe", "experts": SWIGLU}, ["routing-contrastive"]),
    "moiie": (
        {
            "router": {"name": "moiie", "boundaries": [256]},
            "experts": {**SWIGLU, "count": 8},
        },
        ["typed-balance-loss"],
    ),
    "mode": ({"router": "mode", "experts": SWIGLU}, ["weight-load-loss"]),
}


@pytest.mark.parametrize("name", RUNS)
def test_trained_by_its_own_losses_from_a_recipe(name, texts, recipe, tmp_path, moekit):
    moe, names = RUNS[name]
    moe = {"top_k": 2, **moe}
    model = {**MODEL, "moe_attention": moe.pop("moe_attention", None), "moe": moe}
    losses = [{"name": loss, "weight": 0.01} for loss in names]
    path = recipe(model=model, balance={"losses": losses}, train={"tokens": 6 * 4 * 32})
    done = moekit("train", path, "--data", texts, "--out", tmp_path / "out", *ON_CPU)
    assert done.code == 0, done.err
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.moe == moe
    log = (tmp_path / "out" / "training" / "log.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in log if "loss" in json.loads(line)]
    assert steps[-1]["loss"] < steps[0]["loss"]


def test_a_loss_of_another_router_is_told(texts, recipe, tmp_path, moekit):
    path = recipe(model=MODEL, balance={"losses": [{"name": "leaf-entropy", "weight": 0.01}]})
    done = moekit("train", path, "--data", texts, "--out", tmp_path / "out", *ON_CPU)
    assert done.code == 2
    assert "use router 'comet'" in done.err
