"""Layer-streamed profiles are bit by bit those of the model in memory."""

from __future__ import annotations

import pytest
import torch

from moekit.core.convert import convert
from moekit.core.errors import UserError
from moekit.core.load import load
from moekit.core.view import MoEView
from moekit.profile import StreamedModel, align_weights, profile
from moekit.profile.stream import Bank
from tests.families.tiny import build_tiny
from tests.profile.common import batches_of, differences

# Softmax, sigmoid with bias and groups, sinks, Mamba, Mamba2, linear attention, MLA, shared experts
# beside and inside of the block, biased and transposed banks, input scaling, experts as modules.
FAMILIES = (
    "qwen3_moe",
    "mixtral",
    "deepseek_v3",
    "gpt_oss",
    "jamba",
    "nemotron_h",
    "glm4_moe",
    "granitemoehybrid",
    "qwen3_next",
    "olmoe",
    "llama4",
    "kimi_linear",
)
# Router states from layer to layer, choices without experts, banks of other families' own; the
# last draws random tokens in its forward.
MORE = ("zaya", "longcat_flash", "dbrx", "diffusion_gemma")


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request, tmp_path_factory):
    return write(request.param, tmp_path_factory.mktemp("stream") / request.param)


def write(family, path):
    model = build_tiny(family)
    if family == "zaya":
        for layer in MoEView(model):
            # transformers sets it so whatever the checkpoint says; the streamed model reads it.
            layer.correction_bias[-1] = -1
    model.save_pretrained(path)
    return path


def in_memory(path):
    model = load(path).model
    align_weights(model)
    return MoEView(model)


def test_streamed_equals_in_memory(saved):
    expected = profile(in_memory(saved), batches_of())
    for by_expert in (False, True):
        with StreamedModel(saved, by_expert=by_expert) as streamed:
            found = profile(streamed.view, batches_of())
            assert all_away(streamed.model)
        assert differences(expected, found) == []


@pytest.mark.slow
@pytest.mark.parametrize("family", MORE)
def test_more_families(family, tmp_path):
    path = write(family, tmp_path / "m")
    model = in_memory(path)
    torch.manual_seed(0)
    expected = profile(model, batches_of())
    for by_expert in (False, True):
        with StreamedModel(path, by_expert=by_expert) as streamed:
            torch.manual_seed(0)
            assert differences(expected, profile(streamed.view, batches_of())) == []


def all_away(model):
    """Whether nothing of the decoder layers is in memory."""
    layers = [p for n, p in model.named_parameters() if ".layers." in n]
    return bool(layers) and all(p.is_meta for p in layers)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    path = tmp_path_factory.mktemp("stream") / "qwen"
    build_tiny("qwen3_moe", torch.bfloat16).save_pretrained(path)
    return path


def test_heavy_sets_and_other_layouts(qwen, tmp_path):
    sets = ("default", "full", "outputs")
    expected = profile(in_memory(qwen), batches_of(), sets=sets)
    convert(qwen, tmp_path / "fused", to="fused")
    for path in (qwen, tmp_path / "fused"):
        with StreamedModel(path, by_expert=True) as streamed:
            assert differences(expected, profile(streamed.view, batches_of(), sets=sets)) == []


def test_a_number_format_of_ones_own(qwen):
    model = load(qwen, "float32").model
    align_weights(model)
    with StreamedModel(qwen, dtype=torch.float32) as streamed:
        found = profile(streamed.view, batches_of())
    assert differences(profile(MoEView(model), batches_of()), found) == []


def test_one_layer_and_one_expert_at_a_time(saved):
    """At no time is more than one decoder layer, or one bank of experts, in memory."""
    with StreamedModel(saved, by_expert=True) as streamed:
        held = []

        def count(call):
            layers = {
                name.split(".layers.")[1].split(".")[0]
                for name, p in streamed.model.named_parameters()
                if ".layers." in name and not p.is_meta
            }
            held.append(layers)
            bank = getattr(call.layer.experts, "down_proj", None)
            if not call.layer.run_expert.__qualname__.startswith("Llama4"):
                assert isinstance(bank, Bank)

        with streamed.view.observe(count):
            profile(streamed.view, batches_of())
        assert held
        assert all(len(layers) == 1 for layers in held)


def test_weights_go_away_when_a_forward_fails(qwen):
    with StreamedModel(qwen) as streamed:
        streamed.model.model.layers[1].register_forward_pre_hook(_fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            profile(streamed.view, batches_of())
        assert all_away(streamed.model)


def _fail(module, args):
    raise RuntimeError("on purpose")


def test_memory_limits(qwen):
    with StreamedModel(qwen) as streamed:
        whole = streamed.weight_bytes
        assert not streamed.by_expert
    with StreamedModel(qwen, memory=2 * whole) as streamed:
        assert not streamed.by_expert
    with StreamedModel(qwen, memory=2 * whole - 2) as streamed:
        assert streamed.by_expert
        assert streamed.weight_bytes < whole
        assert streamed.batch_size(8) >= 1
    with pytest.raises(UserError, match="give at least"):
        StreamedModel(qwen, memory=1000)
