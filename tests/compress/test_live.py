"""apply_live: the loaded model behaves as the written and reloaded one, and then as before."""

from types import MappingProxyType

import pytest
import torch
from transformers.utils import logging

from moekit.compress import apply_live
from moekit.core.convert import convert
from moekit.core.expert_weights import ExpertWeights
from moekit.core.layout import with_num_experts
from moekit.core.plan import Action, ExpertPlan
from moekit.core.plan_tensors import PlanTensors
from moekit.core.rewrite import Rewrite
from moekit.core.spec import spec_of
from moekit.core.view import MoEView
from tests.core.test_convert import logits, same, saved
from tests.families.tiny import TINY, build_tiny, tiny_inputs

# Of every routing rule that a stock class can hold after a plan: softmax, normalised or not,
# sigmoid with correction bias, limited by groups, shared experts, choices without experts, rows of
# shared experts, biases and transposed storage (gpt_oss), weights on the input (llama4).
FAMILIES = (
    *("mixtral", "qwen3_moe", "qwen2_moe", "deepseek_v2", "deepseek_v3", "gpt_oss", "phimoe"),
    *("longcat_flash", "inkling", "nemotron_h", "llama4", "granitemoe", "lfm2_moe", "olmoe"),
    *("glm4_moe", "ernie4_5_moe", "afmoe", "gemma4"),
)


@pytest.fixture(autouse=True)
def quiet():
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def mixed_plan(spec, router):
    """In every layer and group one expert dropped, two folded in another order of neurons, one
    narrower."""
    layers, neurons = {}, {}
    generator = torch.Generator().manual_seed(0)
    for layer in spec.per_layer:
        size = layer.num_experts // layer.num_groups
        actions = layers[layer.layer_index] = {}
        for first in range(0, layer.num_experts, size):
            actions[first] = Action(drop=True)
            actions[first + 1] = Action(group=first + 1, weight=0.75)
            actions[first + 3] = Action(group=first + 1, weight=0.25)
            order = torch.randperm(layer.expert_width, generator=generator)
            neurons[layer.layer_index, first + 3] = order
            actions[first + 2] = Action(rank=4)
    routers = dict.fromkeys(layers, router)
    return ExpertPlan(layers, routers=routers, tensors=PlanTensors(neurons))


SLOW = {"qwen3_moe", "granitemoe", "olmoe", "glm4_moe", "afmoe", "inkling"}


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=pytest.mark.slow) if f in SLOW else f for f in FAMILIES]
)
def test_live_equals_written(tmp_path, family):
    source = build_tiny(family, config=with_num_experts(TINY[family](), 16))
    path = saved(source, tmp_path / "model")
    # Each router edit in some families: all of them in each takes a minute.
    router = ("slice", "mean", "alias")[FAMILIES.index(family) % 3]
    plan = mixed_plan(spec_of(source), router)
    convert(path, tmp_path / "out", "fused", plan)
    written = type(source).from_pretrained(tmp_path / "out")
    inputs = tiny_inputs(family, source)
    before = logits(source, inputs)
    with apply_live(MoEView(source), plan):
        live = logits(source, inputs)
    # Other shapes of the same products: rounding of float32, larger where layers recur.
    assert torch.allclose(live, logits(written, inputs), atol=1e-4)
    assert (live - before).abs().max() > 1e-2
    assert torch.equal(logits(source, inputs), before)


class Doubled(Rewrite):
    identity = MappingProxyType({"method": "doubled"})

    def expert(self, layer, expert, members, read):
        old = read(min(members))
        return ExpertWeights(old.gate, old.up, old.down * 2)

    def other(self, name, tensor):
        return tensor * 1.5 if "layernorm" in name else tensor


def test_a_rewrite_live_and_written(tmp_path):
    source = build_tiny("mixtral")
    path = saved(source, tmp_path / "model")
    state = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    plan = ExpertPlan({i: {1: Action(drop=True)} for i in range(3)})
    convert(path, tmp_path / "out", "fused", plan, rewrite=Doubled())
    inputs = tiny_inputs("mixtral", source)
    with apply_live(MoEView(source), plan, Doubled()):
        live = logits(source, inputs)
    written = type(source).from_pretrained(tmp_path / "out")
    assert torch.allclose(live, logits(written, inputs), atol=1e-4)
    assert same(source.state_dict(), state)


def test_layers_may_keep_different_numbers():
    model = build_tiny("mixtral")
    inputs = tiny_inputs("mixtral", model)
    drops = {0: [1], 2: [0, 4, 5]}
    plan = ExpertPlan({i: dict.fromkeys(e, Action(drop=True)) for i, e in drops.items()})
    view = MoEView(model)
    with view.ban_experts(drops):
        banned = logits(model, inputs)
    with apply_live(view, plan):
        assert torch.equal(logits(model, inputs), banned)


def test_the_empty_plan_changes_nothing():
    model = build_tiny("mixtral")
    inputs = tiny_inputs("mixtral", model)
    before = logits(model, inputs)
    with apply_live(MoEView(model), ExpertPlan()):
        assert torch.equal(logits(model, inputs), before)


def test_a_linear_map_live_and_written(tmp_path):
    source = build_tiny("gpt_oss")
    path = saved(source, tmp_path / "model")
    layers = [layer.layer_index for layer in spec_of(source).per_layer]
    matrix = torch.randn(7, 8, generator=torch.Generator().manual_seed(0))
    plan = ExpertPlan(
        {i: {2: Action(drop=True)} for i in layers},
        routers=dict.fromkeys(layers, "linear"),
        tensors=PlanTensors(router_maps=dict.fromkeys(layers, matrix)),
    )
    convert(path, tmp_path / "out", "fused", plan)
    inputs = tiny_inputs("gpt_oss", source)
    with apply_live(MoEView(source), plan):
        live = logits(source, inputs)
    written = type(source).from_pretrained(tmp_path / "out")
    assert torch.allclose(live, logits(written, inputs), atol=1e-4)
