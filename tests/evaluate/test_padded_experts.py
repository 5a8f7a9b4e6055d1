"""Padded experts are used where they save time, and the numbers stay."""

import pytest
import torch

from moekit.core.view import MoEView
from moekit.evaluate.padded_experts import padded_experts
from moekit.ops.grouped import GROUPED
from tests.families.tiny import build_tiny, tiny_inputs


def used(model):
    return model.config.get_text_config()._experts_implementation


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_outputs_stay(family):
    """Layer by layer: a whole model may choose another expert after a last bit."""
    model = build_tiny(family, torch.bfloat16)
    calls = []
    with MoEView(model).observe(calls.append), torch.no_grad():
        model(**tiny_inputs(family, model))
    for call in calls:
        arguments = call.hidden, call.ids, call.weights
        with torch.no_grad():
            expected = call.layer.experts(*arguments).float()
            with padded_experts(model):
                assert used(model) == GROUPED
                found = call.layer.experts(*arguments).float()
        assert used(model) == "grouped_mm"
        # The same products; only kernels for other numbers of rows may round bf16's last bit
        # (2^-8) another way.
        assert (found - expected).norm() < 2**-8 * expected.norm()


@pytest.mark.parametrize("family", ["gpt_oss", "nemotron_h", "llama4", "longcat_flash"])
def test_other_experts_are_left_alone(family):
    model = build_tiny(family, torch.bfloat16)
    before = used(model)
    with padded_experts(model):
        assert used(model) == before


def test_float32_and_a_choice_of_the_user_are_left_alone():
    model = build_tiny("qwen3_moe")
    with padded_experts(model):
        assert used(model) == "grouped_mm"
    model = build_tiny("qwen3_moe", torch.bfloat16)
    model.set_experts_implementation("eager")
    with padded_experts(model):
        assert used(model) == "eager"
    with padded_experts(torch.nn.Linear(2, 2)):
        pass


def test_a_backend_at_the_seam_comes_first():
    model = build_tiny("qwen3_moe", torch.bfloat16)
    inputs = tiny_inputs("qwen3_moe", model)
    calls = []

    def backend(experts, hidden, ids, weights):
        calls.append(len(hidden))
        return torch.zeros_like(hidden)

    with MoEView(model).use_backend(backend), padded_experts(model), torch.no_grad():
        model(**inputs)
    assert len(calls) == len(MoEView(model))


def test_restored_after_an_error():
    model = build_tiny("qwen3_moe", torch.bfloat16)
    with pytest.raises(RuntimeError, match="on purpose"), padded_experts(model):
        raise RuntimeError("on purpose")
    assert used(model) == "grouped_mm"
