"""Plans from scores: the contract over every saliency, families of different rules, domains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import moekit
from moekit.compress.live import apply_live
from moekit.compress.prune.evolution import token_loss
from moekit.compress.prune.planning import any_plan, plan_of, prune, rooms_of
from moekit.compress.request import experts_per_layer
from moekit.core.collect import Batch
from moekit.core.convert import convert
from moekit.core.errors import UserError
from moekit.core.registry import registry
from moekit.core.spec import spec_of
from moekit.profile import profile
from tests.compress.prune.common import tiny_stats, tiny_view, tokens

METHODS = [method.name for method in registry.methods(kind="saliency")]
GROUPED = {"n_group": 2, "topk_group": 1}
# Softmax, the same without normalisation, sigmoid with a correction bias and groups, biases and
# transposed storage, shared experts.
FAMILIES = {
    "mixtral": {},
    "jamba": {},
    "deepseek_v3": GROUPED,
    "glm4_moe": GROUPED,
    "gpt_oss": {},
    "qwen2_moe": {},
}


@pytest.fixture(scope="module")
def view():
    return tiny_view()


@pytest.fixture(scope="module")
def stats(view):
    return tiny_stats(view)


def logits(model, batch: Batch | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=(batch or tokens()).ids).logits


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("method", METHODS)
def test_a_ratio_of_zero_is_the_identity(method, scope, view, stats, tmp_path):
    spec = spec_of(view.model)
    plan = prune(spec, stats, method, experts_per_layer(spec, ratio=0.0), scope=scope)
    assert plan.uses() == []
    expected = logits(view.model)
    with apply_live(view, plan):
        assert torch.equal(logits(view.model), expected)


@pytest.mark.parametrize("method", METHODS)
def test_half_of_the_experts(method, view, stats):
    spec = spec_of(view.model)
    plan = prune(spec, stats, method, experts_per_layer(spec, ratio=0.5))
    plan.validate(spec)
    assert plan.result().num_experts == (4, 4)
    again = prune(spec, stats, method, experts_per_layer(spec, ratio=0.5))
    assert plan == again


@pytest.mark.parametrize("family", FAMILIES)
def test_slicing_is_masking(family, tmp_path):
    # Check (c) of REAP, written, loaded by a stock class, and beside the mask at the seam.
    view = tiny_view(family, **FAMILIES[family])
    spec = spec_of(view.model)
    stats = tiny_stats(view)
    plan = prune(spec, stats, "reap", experts_per_layer(spec, ratio=0.5))
    view.model.save_pretrained(tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "out", plan=plan)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    gone = {layer.position: plan.dropped(layer.index) for layer in view}
    with view.ban_experts(gone):
        expected = logits(view.model)
    # float32: matrices of other sizes sum in another order.
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_protected_experts_stay(scope, view, stats):
    # Check (c) of Super Experts.
    spec = spec_of(view.model)
    keep = experts_per_layer(spec, count=3)
    free = prune(spec, stats, "reap", keep, scope=scope)
    worst = {index: free.dropped(index)[:2] for index in spec.moe_layers}
    plan = prune(spec, stats, "reap", keep, scope=scope, protect=worst)
    for index, experts in worst.items():
        assert not set(experts) & set(plan.dropped(index))
        assert all(plan.action(index, e).protect for e in experts)
    assert sum(plan.result().num_experts) == sum(free.result().num_experts)


def test_a_global_budget_keeps_the_sum(view, stats):
    spec = spec_of(view.model)
    plan = prune(spec, stats, "gate-mass", experts_per_layer(spec, ratio=0.5), scope="global")
    counts = plan.result().num_experts
    assert sum(counts) == 8
    assert min(counts) >= 2


def test_a_plan_before_anything_is_measured(view):
    spec = spec_of(view.model)
    keep = experts_per_layer(spec, ratio=0.5)
    assert any_plan(spec, keep).result().num_experts == (4, 4)
    assert sorted(any_plan(spec, keep, "global").result().num_experts) == [2, 6]
    assert any_plan(spec, keep, "layer", {1: [7]}).action(1, 7).protect


def test_plans_of_keep_sets(view):
    spec = spec_of(view.model)
    rooms = rooms_of(spec, experts_per_layer(spec, count=2), {1: [7]})
    plan = plan_of(spec, rooms, [[1, 7], [0, 5]], "by hand")
    assert plan.survivors(1, 8) == [1, 7]
    assert plan.survivors(2, 8) == [0, 5]
    assert plan.action(1, 7).protect


def test_refusals(view, stats):
    spec = spec_of(view.model)
    keep = experts_per_layer(spec, count=2)
    with pytest.raises(UserError, match="1 of 8 experts would stay in layer 1"):
        prune(spec, stats, "reap", {1: 1, 2: 1})
    with pytest.raises(UserError, match="layer 1 protects 3 experts and keeps 2"):
        prune(spec, stats, "reap", keep, protect={1: [0, 1, 2]})
    with pytest.raises(UserError, match="layer 0 has protected experts but is no MoE layer"):
        prune(spec, stats, "reap", keep, protect={0: [1]})
    other = tiny_view("mixtral")
    with pytest.raises(UserError, match="those of a 'qwen3_moe' model"):
        prune(spec_of(other.model), stats, "reap", {0: 4, 1: 4})


def test_experts_of_one_domain_serve_it_and_hurt_the_other():
    # Check (c) of EASY-EP, on a trained model: half of the experts, chosen on code or on prose.
    loaded = moekit.load("babel", dtype="float32")
    view, root = moekit.MoEView(loaded.model), Path(moekit.__file__).parents[2]
    texts = {
        "code": Path(json.__file__).with_name("decoder.py").read_text(),
        "prose": (root / "docs" / "log.md").read_text(),
    }
    seen, unseen = {}, {}
    for name, text in texts.items():
        ids = torch.tensor(loaded.tokenizer(text)["input_ids"][:1536]).view(6, 256)
        seen[name] = Batch(ids[:4], None, [name] * 4)
        unseen[name] = [ids[4:]]
    stats = profile(view, list(seen.values()))
    keep = experts_per_layer(loaded.spec, ratio=0.5)
    losses = {}
    for chosen in texts:
        with apply_live(view, prune(loaded.spec, stats, "easy-ep", keep, domain=chosen)):
            for name, batches in unseen.items():
                losses[chosen, name] = token_loss(view.model, batches)
    assert losses["code", "code"] < losses["prose", "code"]
    assert losses["prose", "prose"] < losses["code", "prose"]
