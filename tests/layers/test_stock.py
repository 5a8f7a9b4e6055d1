"""Models that equal a stock family come out as that family, with the same logits."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from moekit.core.errors import UserError
from moekit.layers.stock import stock_family, to_stock
from moekit.layers.terms import ExpertBias
from tests.layers.test_model import IDS, LATENT, SWIGLU, model

SHARED = {"expert_width": 32}
V3 = {"name": "deepseek-v3", "groups": 2, "keep_groups": 1}
CASES = {
    "qwen3_moe": ({}, {}),
    "qwen3_moe raw": ({"router": "softmax-raw", "layers": [0, 2]}, {"tie_word_embeddings": True}),
    "qwen3_moe rounded": ({"router": "token-rounding"}, {"elastic_depth": {"depths": [2]}}),
    "qwen3_moe candidates": ({"router": {"name": "rexmoe", "candidates": 2}}, {}),
    "mixtral": ({"layers": None}, {"attention": "mixtral"}),
    "dots1": ({"router": "loss-free", "shared": SHARED}, {}),
    "deepseek_v3": ({"router": V3, "shared": SHARED, "experts": {**SWIGLU, "count": 8}}, LATENT),
}


@pytest.mark.parametrize("case", CASES)
def test_written_as_the_family_it_equals(case, tmp_path):
    moe, fields = CASES[case]
    built = model(moe, **fields)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, param in built.named_parameters():
            if "router" in name or "pool" in name:
                param.normal_(std=0.2, generator=generator)
        for module in built.modules():
            if isinstance(module, ExpertBias):
                module.expert_bias.normal_(std=0.1, generator=generator)
    assert stock_family(built) == case.split()[0]
    to_stock(built).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded).__module__.startswith("transformers.")
    # The same sums by other kernels: fp32 rounding only.
    torch.testing.assert_close(loaded(IDS).logits, built(IDS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("moe", "why"),
    [
        ({"router": "top-p"}, "no top-k"),
        ({"router": {"name": "softmax-raw", "eval_capacity": 2.0}}, "dropped outside of training"),
        ({"router": "loss-free"}, "without a shared expert"),
        ({"shared": {"expert_width": 16}}, "with a shared expert"),
        ({"experts": {**SWIGLU, "type": "ffn"}}, "other than SwiGLU"),
        ({"overrides": [{"layers": [2], "top_k": 1, "router": "softmax-raw"}]}, "layers differ"),
        ({"share_pool": 2}, "no pool of its own"),
        ({"router": {"name": "softmax-raw", "scale": 2.0}}, "a scale or groups"),
    ],
)
def test_what_no_family_has_is_said(moe, why):
    built = model(moe)
    assert stock_family(built) is None
    with pytest.raises(UserError, match=why):
        to_stock(built)


def test_what_only_training_does_is_no_difference():
    built = model({"router": {"name": "softmax-raw", "noise": 0.1, "capacity": 1.0}})
    assert stock_family(built) == "qwen3_moe"


def test_attention_experts_are_no_stock_family():
    heads = {"type": "heads", "count": 4, "top_k": 2, "router": "softmax-raw"}
    with pytest.raises(UserError, match="experts in its attention"):
        to_stock(model(moe_attention=heads))
