"""MoE to dense: the way back of what was upcycled, and what is honest about the rest."""

from __future__ import annotations

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from moekit.core.errors import UserError
from moekit.core.stats import ExpertStats, StatsLayer
from moekit.upcycle.run import Request, upcycle
from tests.families.tiny import build_tiny
from tests.upcycle.dense_models import SHAPE, dense_config, logits, tokens, write_dense

# The mean of equal weights is rounded once.
ROUNDING = 1e-5
BACK = [
    ("llama", {}, "llama"),
    ("qwen2", {}, "qwen2"),
    ("qwen3", {}, "qwen3"),
    ("qwen3", {"shared_copies": 1}, "qwen3"),
    ("olmo2", {}, "olmo2"),
    ("granite", {}, "granite"),
    ("ernie4_5", {"shared_copies": 1}, "ernie4_5"),
]


@pytest.mark.parametrize(("family", "options", "back"), BACK)
def test_an_upcycled_model_comes_back(tmp_path, family, options, back):
    config = CONFIG_MAPPING[family](**SHAPE)
    source = write_dense(tmp_path / "dense", config)
    upcycle(Request("dense-to-moe", str(source), options=options), tmp_path / "moe", check=False)
    result = upcycle(Request("average", str(tmp_path / "moe")), tmp_path / "back", check=False)
    assert result.model_type == back
    first, again = (
        logits(AutoModelForCausalLM.from_pretrained(path), tokens())
        for path in (source, tmp_path / "back")
    )
    assert float((first - again).abs().max() / first.abs().max()) < ROUNDING


def test_neurons_side_by_side_hold_equal_experts_too(tmp_path):
    source = write_dense(tmp_path / "dense", dense_config("qwen3"))
    upcycle(Request("sparse", str(source)), tmp_path / "moe", check=False)
    request = Request("side-by-side", str(tmp_path / "moe"), options={"slices": 3})
    result = upcycle(request, tmp_path / "wide")
    assert result.measured is not None
    assert result.measured < ROUNDING
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "wide").config.intermediate_size == 144


def test_permuted_neurons_average_to_the_expert_when_aligned(tmp_path):
    model = build_tiny("qwen3_moe")
    generator = torch.Generator().manual_seed(0)
    for layer in model.model.layers:
        if not hasattr(layer.mlp, "experts"):
            continue
        bank = layer.mlp.experts
        gate, up = bank.gate_up_proj[0].detach().chunk(2)
        down = bank.down_proj[0].detach().clone()
        for expert in range(1, len(bank.down_proj)):
            order = torch.randperm(len(gate), generator=generator)
            bank.gate_up_proj.data[expert] = torch.cat([gate[order], up[order]])
            bank.down_proj.data[expert] = down[:, order]
    model.config.norm_topk_prob = True
    model.save_pretrained(tmp_path / "moe")
    for align, equal in ((True, True), (False, False)):
        request = Request("average", str(tmp_path / "moe"), options={"align": align})
        measured = upcycle(request, tmp_path / f"out-{align}").measured
        assert measured is not None
        assert (measured < ROUNDING) == equal


def test_different_experts_are_not_called_equal(tmp_path):
    build_tiny("mixtral").save_pretrained(tmp_path / "moe")
    result = upcycle(Request("average", str(tmp_path / "moe")), tmp_path / "out")
    assert result.start.equal_to is None
    assert "alike for all" in result.start.text
    assert result.measured is not None
    assert result.measured > 0.1


def test_the_often_chosen_expert_alone_is_the_average(tmp_path):
    model = build_tiny("mixtral")
    model.save_pretrained(tmp_path / "moe")
    layers = [StatsLayer(i, f"{i}", 8, 8, 2) for i in range(model.config.num_hidden_layers)]
    stats = ExpertStats("mixtral", layers, ["all"], {"moments": [(1, 0, 0)]})
    for position in range(len(layers)):
        stats.held[position, "count"] = torch.tensor([[0, 0, 0, 7, 0, 0, 0, 0]])
        stats.held[position, "moments"] = torch.ones(1, 8, 1, dtype=torch.float64)
        stats.held[position, "tokens"] = torch.tensor([7])
    stats.save(tmp_path / "stats")
    request = Request("frequency-average", str(tmp_path / "moe"))
    upcycle(request, tmp_path / "out", stats=tmp_path / "stats")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    down = dense.model.layers[0].mlp.down_proj.weight
    torch.testing.assert_close(down, model.model.layers[0].mlp.experts.down_proj[3])


@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        ("olmoe", {}, "no dense class of transformers has the attention and norms of olmoe"),
        ("qwen2_moe", {}, "raw weights sum to what the router says, so it needs --stats"),
        ("mixtral", {"mixture": "gate"}, "mixture=gate needs --stats"),
        ("mixtral", {"slices": 9}, "there are 8 experts"),
        ("mixtral", {"mixture": "best"}, "uniform, frequency, gate"),
    ],
)
def test_refused(tmp_path, family, options, words):
    build_tiny(family).save_pretrained(tmp_path / "moe")
    with pytest.raises(UserError, match=words):
        upcycle(Request("moe-to-dense", str(tmp_path / "moe"), options=options), tmp_path / "out")
