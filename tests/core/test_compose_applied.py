"""Applying two plans in turn is applying the plan that they compose to."""

import random

import pytest
import torch
from transformers.utils import logging

from moekit.core.convert import convert
from moekit.core.errors import UserError
from moekit.core.layout import with_num_experts
from moekit.core.plan import Action, ExpertPlan, Fingerprint, Fit
from moekit.core.plan_tensors import PlanTensors
from moekit.core.spec import spec_from_config, spec_of
from tests.core.test_convert import saved, tensors_of
from tests.families.tiny import TINY, build_tiny


@pytest.fixture(autouse=True)
def quiet():
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def random_plan(rng, spec, drops, router):
    """Experts dropped, folded in other orders of neurons, shortened; as many in every layer."""
    layers, neurons, maps = {}, {}, {}
    width = spec.expert_width - rng.choice([0, 8])
    for layer in spec.per_layer:
        index, free = layer.layer_index, list(range(layer.num_experts))
        rng.shuffle(free)
        actions = {free.pop(): Action(drop=True) for _ in range(drops)}
        for size in (2, 3):
            members = [free.pop() for _ in range(size)]
            shares = torch.rand(size, generator=torch.Generator().manual_seed(rng.randrange(99)))
            for member, share in zip(members, (shares / shares.sum()).tolist(), strict=True):
                actions[member] = Action(group=members[0], weight=share)
                order = list(range(layer.expert_width))
                rng.shuffle(order)
                neurons[index, member] = torch.tensor(order[:width])
        for expert in free:
            actions[expert] = Action(width=width)
        layers[index] = actions
        if router == "linear":
            left = layer.num_experts - drops - 3
            maps[index] = torch.randn(
                left, layer.num_experts, generator=torch.Generator().manual_seed(1)
            )
    routers = dict.fromkeys(layers, router)
    made = PlanTensors(neurons, maps)
    return ExpertPlan(layers, Fingerprint.of(spec), routers=routers, tensors=made)


@pytest.mark.parametrize(
    ("family", "routers"),
    [
        ("mixtral", ("slice", "slice")),
        ("mixtral", ("mean", "mean")),
        ("mixtral", ("linear", "slice")),
        ("mixtral", ("slice", "mean")),
        ("gpt_oss", ("mean", "linear")),
        ("lfm2_moe", ("slice", "linear")),
    ],
)
def test_composition_is_application_in_turn(tmp_path, family, routers):
    rng = random.Random(len(family) + len(routers[0]))
    source = build_tiny(family, config=with_num_experts(TINY[family](), 16))
    path = saved(source, tmp_path / "model")
    first = random_plan(rng, spec_of(source), 2, routers[0])
    convert(path, tmp_path / "one", "fused", first)
    second = random_plan(rng, spec_from_config(tmp_path / "one"), 1, routers[1])
    convert(tmp_path / "one", tmp_path / "two", "fused", second)
    both = first.then(second)
    both.save(tmp_path / "both.json")
    convert(path, tmp_path / "both", "fused", tmp_path / "both.json")
    turned, joined = tensors_of(tmp_path / "two"), tensors_of(tmp_path / "both")
    assert turned.keys() == joined.keys()
    for name, tensor in turned.items():
        # Two sums against one: a few roundings of float32.
        assert torch.allclose(tensor, joined[name], atol=1e-5, rtol=1e-5), name


def plan(router="slice", fit=None, groups=True, values=None):
    actions = {0: Action(drop=True)}
    if groups:
        actions |= {1: Action(group=1, weight=0.5), 2: Action(group=1, weight=0.5)}
    tensors = PlanTensors(values=values or {})
    return ExpertPlan({0: actions}, routers={0: router}, tensors=tensors, fit=fit)


def test_what_no_single_plan_can_say():
    with pytest.raises(UserError, match="router edits slice and then alias are no single edit"):
        plan("slice").then(plan("alias"))
    with pytest.raises(UserError, match='need "model" in the first plan'):
        plan("mean").then(plan("slice"))
    with pytest.raises(UserError, match=r"second plan is fitted \(gptq\)"):
        plan().then(plan(fit=Fit("gptq")))
    with pytest.raises(UserError, match=r"first plan is fitted .*; only dropping"):
        plan(fit=Fit("gptq")).then(plan())
    assert plan(fit=Fit("gptq")).then(plan(groups=False)).fit == Fit("gptq")
    with pytest.raises(UserError, match=r"replaces norm\.weight"):
        plan(values={"norm.weight": torch.ones(2)}).then(plan())
    assert plan("alias").then(plan("alias")).router(0) == "alias"
