"""Scaling input channels and middles changes nothing in float32, logits and routing included."""

import copy

import pytest
import torch
from transformers import PreTrainedModel

from moekit.compress.quantize.expert_scaling import ChannelScales, middle_can_be_scaled
from moekit.compress.quantize.input_scaling import input_scalings, scalings_of
from moekit.compress.quantize.layer_experts import middle_of, output_of
from moekit.core.errors import UserError
from moekit.core.view import MoEView
from tests.families.tiny import TINY, build_tiny, tiny_inputs

# Families whose layers show no norm output that only products read, each for another reason.
REFUSED = {
    "axk2": "has no weight to scale",
    "dbrx": "cannot be traced",
    "flex_olmo": "no norm hands its output",
    "llama4": "no norm hands its output",
    "minimax": "is also used by mul",
}
# Among those that can be scaled: softmax, sigmoid with bias, groups, shared experts and their gate,
# biases and transposed storage, norms that count from zero, attention beside the block.
FAST = [
    "qwen3_moe", "qwen2_moe", "qwen3_next", "deepseek_v3", "gpt_oss", "nemotron_h", "phimoe",
    "cohere2_moe",
]  # fmt: skip
SLOW = [
    "mixtral", "olmoe", "deepseek_v2", "glm4_moe", "granitemoeshared", "jamba", "step3p7",
    "hunyuan_v1_moe", "ernie4_5_moe", "minimax_m2", "gemma4", "zaya",
]  # fmt: skip


def spread_out(size, seed):
    """Scales from a half to two."""
    generator = torch.Generator().manual_seed(seed)
    return 4 ** (torch.rand(size, generator=generator) - 0.5)


def outcome(model, inputs):
    """Logits, and the routing of every layer."""
    view = MoEView(model)
    with torch.no_grad(), view.trace() as trace:
        logits = model(**inputs).logits
    layers = [trace.layer(position) for position in range(len(view))]
    return logits, [layer.topk_ids for layer in layers], [layer.topk_weights for layer in layers]


def scale_everything(model: PreTrainedModel, middles: bool) -> int:
    """Scale every layer in place; returns how many of them had their middles scaled as well."""
    view, tensors = MoEView(model), dict(model.named_parameters())
    scalings, count = scalings_of(model), 0
    for layer in view:
        scaling = scalings[layer.index]
        scale = spread_out(layer.get_expert(0).up.shape[1], layer.index)
        values = scaling.norm_values(scale, tensors) | scaling.matrix_values(scale, tensors)
        with torch.no_grad():
            for name, value in values.items():
                tensors[name].copy_(value)
        scaled = middles and middle_can_be_scaled(layer.experts)
        count += scaled
        for e in range(layer.num_experts):
            expert = layer.get_expert(e)
            middle = spread_out(expert.down.shape[1], e) if scaled else None
            layer.set_expert(e, ChannelScales(scale, middle).apply(expert))
    return count


def same_outcome(found, expected):
    # Every product rounds anew, a few layers deep.
    assert torch.allclose(found[0], expected[0], rtol=1e-3, atol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(found[1], expected[1], strict=True))
    assert all(
        torch.allclose(a, b, rtol=1e-3, atol=1e-5)
        for a, b in zip(found[2], expected[2], strict=True)
    )


@pytest.mark.parametrize(
    "family", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_folding_alone_changes_nothing(family):
    model = build_tiny(family)
    inputs = tiny_inputs(family, model)
    expected = outcome(model, inputs)
    changed = copy.deepcopy(model)
    middles = scale_everything(changed, middles=True)
    assert middles == (0 if family in ("gpt_oss", "nemotron_h") else len(MoEView(model)))
    moved = [
        name
        for (name, new), old in zip(changed.named_parameters(), model.parameters(), strict=True)
        if not torch.equal(new, old)
    ]
    assert len(moved) >= 3 * len(MoEView(model)) - 2
    same_outcome(outcome(changed, inputs), expected)


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in TINY if name not in FAST + SLOW])
def test_folding_is_exact_or_refused(family):
    model = build_tiny(family)
    inputs = tiny_inputs(family, model)
    try:
        scalings_of(model)
    except UserError:
        return
    expected = outcome(model, inputs)
    scale_everything(model, middles=True)
    same_outcome(outcome(model, inputs), expected)


@pytest.mark.parametrize(("family", "reason"), REFUSED.items())
def test_what_cannot_be_folded_is_refused_by_name(family, reason):
    config = TINY[family]()
    with pytest.raises(UserError, match=reason) as refusal:
        input_scalings(config)
    assert config.model_type in str(refusal.value)
    assert "rtn or gptq" in str(refusal.value)


def test_the_scale_of_a_rounded_norm_is_the_one_that_holds():
    model = build_tiny("qwen3_moe").bfloat16()
    tensors = dict(model.named_parameters())
    scaling = scalings_of(model)[MoEView(model)[0].index]
    scale = spread_out(tensors[f"{scaling.norm}.weight"].shape[0], 1)
    exact = scaling.exact_scale(scale, tensors)
    name = f"{scaling.norm}.weight"
    new = scaling.norm_values(scale, tensors)[name].float()
    assert torch.allclose(new * exact, tensors[name].float(), rtol=1e-6)
    # Within half a unit in the last place of bfloat16 of what was asked for.
    assert torch.allclose(exact, scale, rtol=2**-8)
    assert not torch.equal(exact, scale)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "nemotron_h", "aria"])
def test_experts_run_as_the_model_runs_them(family):
    model = build_tiny(family)
    layer = MoEView(model)[0]
    expert = layer.get_expert(2)
    hidden = torch.randn(5, expert.up.shape[1], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = output_of(layer, expert, middle_of(layer, expert, hidden))
        assert torch.allclose(found, layer.run_expert(2, hidden), rtol=1e-5, atol=1e-6)
