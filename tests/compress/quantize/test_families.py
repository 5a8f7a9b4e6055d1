"""Quantized models of many families load with stock classes and say what the live model says."""

import pytest
import torch

from moekit.compress import apply_live, rewrite_of
from moekit.compress.quantize.planning import QuantizeRequest, plan_quantization
from moekit.core.convert import convert
from moekit.core.packed import CodecChoice
from moekit.core.spec import spec_of
from moekit.core.view import MoEView
from moekit.profile import align_weights, profile
from tests.families.tiny import build_tiny, model_class, tiny_inputs

# Softmax and sigmoid, a bias for the choice, groups, shared experts, biases and transposed storage,
# no gate, attention beside the block; awq where the input can be scaled.
FAST = {"mixtral": "awq", "gpt_oss": "awq", "deepseek_v3": "eaquant", "minimax": "gptq"}
SLOW = {
    "qwen2_moe": "awq",
    "qwen3_moe": "eaquant",
    "qwen3_next": "awq",
    "glm4_moe": "awq",
    "granitemoe": "awq",
    "olmoe": "eaquant",
    "phimoe": "awq",
    "jamba": "awq",
    "nemotron_h": "awq",
    "ernie4_5_moe": "awq",
    "cohere2_moe": "awq",
    "hunyuan_v1_moe": "eaquant",
    "flex_olmo": "gptq",
    "deepseek_v2": "gptq",
}


@pytest.mark.parametrize(
    ("family", "method"),
    [*FAST.items(), *(pytest.param(*row, marks=pytest.mark.slow) for row in SLOW.items())],
)
def test_written_and_reloaded_models_are_the_live_ones(family, method, tmp_path):
    model = build_tiny(family)
    inputs = tiny_inputs(family, model)
    view, spec = MoEView(model), spec_of(model)
    model.save_pretrained(tmp_path / "plain")
    align_weights(model)
    stats = profile(view, [inputs["input_ids"]] * 4, sets=("default", "full", "inputs"))
    # Rows as groups fit every width of the tiny models.
    solver = None if method == "gptq" else "gptq"
    request = QuantizeRequest(method, CodecChoice("ternary-rows", 32), solver=solver, min_tokens=4)
    plan = plan_quantization(request, spec, stats, view).plan
    rewrite = rewrite_of(plan, tmp_path / "plain", stats)
    with torch.no_grad():
        before = model(**inputs).logits
        with apply_live(view, plan, rewrite, rewrite.codec):
            live = model(**inputs).logits
    convert(tmp_path / "plain", tmp_path / "small", plan=plan, rewrite=rewrite, codec=rewrite.codec)
    loaded = model_class(family).from_pretrained(tmp_path / "small").eval()
    align_weights(loaded)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, live)
    assert not torch.equal(before, live)
