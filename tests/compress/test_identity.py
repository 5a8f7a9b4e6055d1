"""A plan that changes nothing leaves every tensor of every family bit for bit."""

import pytest
from transformers.utils import logging

from moekit.core.convert import convert
from moekit.core.plan import Action, ExpertPlan
from moekit.core.spec import spec_of
from tests.core.test_convert import same, saved, tensors_of
from tests.families.tiny import TINY, build_tiny

# Softmax, sigmoid with correction bias, groups, shared experts, biases and transposed storage, no
# gate, choices without experts, flat banks, weights on the input, sparsemixer.
FAST = (
    *("mixtral", "qwen2_moe", "deepseek_v2", "deepseek_v3", "gpt_oss", "nemotron_h"),
    *("longcat_flash", "dbrx", "llama4", "phimoe", "lfm2_moe", "granitemoe", "jetmoe"),
)
# Two sets of experts of one layer number, which plans cannot tell apart.
TWICE = ("diffusion_gemma", "ernie4_5_vl_moe", "nllb_moe", "switch_transformers")
FAMILIES = [
    f if f in FAST else pytest.param(f, marks=pytest.mark.slow) for f in TINY if f not in TWICE
]


@pytest.fixture(autouse=True)
def quiet():
    logging.set_verbosity_error()
    logging.disable_progress_bar()


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_asked(tmp_path, family):
    model = build_tiny(family)
    path = saved(model, tmp_path / "model")
    convert(path, tmp_path / "plain", "fused")
    layers = [layer.layer_index for layer in spec_of(model).per_layer]
    plan = ExpertPlan({index: {1: Action(protect=True)} for index in layers}, note="nothing")
    result = convert(path, tmp_path / "out", "fused", plan)
    assert result.experts == {}
    assert same(tensors_of(tmp_path / "plain"), tensors_of(tmp_path / "out"))


COMPUTED = ("mixtral", "deepseek_v3", "gpt_oss", "nemotron_h", "longcat_flash", "dbrx", "jetmoe")


@pytest.mark.parametrize("family", COMPUTED)
def test_computed_experts_that_are_their_originals(tmp_path, family):
    """Groups of one, full width and full rank go through the whole way of new experts."""
    model = build_tiny(family)
    path = saved(model, tmp_path / "model")
    convert(path, tmp_path / "plain", "fused")
    layers = {}
    for layer in spec_of(model).per_layer:
        rank = min(layer.hidden_size, layer.expert_width)
        layers[layer.layer_index] = {
            0: Action(group=0, weight=1.0),
            1: Action(width=layer.expert_width),
            2: Action(rank=rank),
        }
    convert(path, tmp_path / "out", "fused", ExpertPlan(layers))
    assert same(tensors_of(tmp_path / "plain"), tensors_of(tmp_path / "out"))
