"""A MoE of several fine-tunes: where its parts come from, and how its router starts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from moekit.core.errors import UserError
from moekit.upcycle.moe_recipe import load_moe_recipe
from moekit.upcycle.router_inputs import rows_from_inputs
from moekit.upcycle.run import Request, upcycle
from tests.models import tiny_tokenizer
from tests.upcycle.dense_models import dense_config, write_dense

PROMPTS = {
    "code": "def route(x): return x",
    "prose": "the router chooses",
    "german": "zwei Experten",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    base = write_dense(root / "base", dense_config("llama"))
    for seed, name in enumerate(PROMPTS, start=1):
        write_dense(root / name, like=base, seed=seed)
    return root


def recipe(path, models, experts=None, **more):
    experts = experts or [
        {"source_model": str(models / name), "positive_prompts": [prompt]}
        for name, prompt in PROMPTS.items()
    ]
    path.write_text(
        yaml.safe_dump({"base_model": str(models / "base"), "experts": experts, **more})
    )
    return load_moe_recipe(path, to="fused")


def loaded(path):
    return AutoModelForCausalLM.from_pretrained(path).eval()


def test_btx_takes_networks_as_experts_and_the_mean_of_the_rest(models, tmp_path):
    others = tuple(str(models / name) for name in PROMPTS)
    upcycle(Request("btx", str(models / "base"), others), tmp_path / "out")
    made, parts = loaded(tmp_path / "out"), [loaded(other) for other in others]
    for number, part in enumerate(parts):
        expert = made.model.layers[1].mlp.experts
        assert torch.equal(expert.down_proj[number], part.model.layers[1].mlp.down_proj.weight)
    mean = torch.stack([part.model.norm.weight for part in parts]).mean(0)
    torch.testing.assert_close(made.model.norm.weight, mean)


def test_the_base_may_be_an_expert_too(models, tmp_path):
    request = Request("btx", str(models / "base"), (str(models / "code"),), {"with_base": True})
    upcycle(request, tmp_path / "out")
    experts = loaded(tmp_path / "out").model.layers[0].mlp.experts.down_proj
    assert torch.equal(experts[0], loaded(models / "base").model.layers[0].mlp.down_proj.weight)


def test_mergekit_moe_keeps_everything_else_of_the_base(models, tmp_path):
    upcycle(recipe(tmp_path / "r.yaml", models), tmp_path / "out")
    made, base = loaded(tmp_path / "out"), loaded(models / "base")
    assert torch.equal(made.lm_head.weight, base.lm_head.weight)
    first, second = (m.model.layers[1].self_attn.q_proj.weight for m in (made, base))
    assert torch.equal(first, second)


@pytest.mark.parametrize("gate_mode", ["hidden", "hidden_avg"])
def test_a_prompt_ranks_its_expert_first_at_the_real_input_of_the_router(
    models, tmp_path, gate_mode
):
    upcycle(recipe(tmp_path / "r.yaml", models, gate_mode=gate_mode), tmp_path / "out")
    base, made = loaded(models / "base"), loaded(tmp_path / "out")
    tokenizer = tiny_tokenizer()
    for layer in range(2):
        rows = made.model.layers[layer].mlp.gate.weight.detach()
        for number, prompt in enumerate(PROMPTS.values()):
            seen = []
            hook = base.model.layers[layer].mlp.register_forward_pre_hook(
                lambda _, inputs, seen=seen: seen.append(inputs[0][0].detach())
            )
            base(tokenizer(prompt, return_tensors="pt").input_ids)
            hook.remove()
            read = seen[0][-1] if gate_mode == "hidden" else seen[0].mean(0)
            assert int((rows @ read).argmax()) == number


def test_rows_are_of_one_spread_and_rank_their_own_inputs_first():
    generator = torch.Generator().manual_seed(0)
    # Inputs with much in common, as hidden states have.
    inputs = 5 * torch.randn(1, 32, generator=generator) + torch.randn(6, 32, generator=generator)
    for centre in (True, False):
        rows = rows_from_inputs(inputs, None, centre)
        values = inputs @ rows.T
        assert values.argmax(1).tolist() == list(range(6))
        assert float(values.std()) == pytest.approx(1, abs=1e-4)
    centred = rows_from_inputs(inputs, None, True)
    # Nothing of what all have in common is left to favour an expert.
    assert float((centred @ inputs.mean(0)).abs().max()) < 1e-3
    plain = rows_from_inputs(inputs, None, centre=False)
    assert margin(inputs @ centred.T) > margin(inputs @ plain.T)


def margin(values: torch.Tensor) -> float:
    """By how much the own input of a row is the highest, at the least."""
    others = values.masked_fill(torch.eye(len(values), dtype=torch.bool), -torch.inf)
    return float((values.diag() - others.amax(1)).min())


def test_negative_prompts_lower_what_they_share(models):
    positive = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    negative = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    rows = rows_from_inputs(positive, negative, False)
    assert float(rows[0, 1]) == pytest.approx(0, abs=1e-6)


def test_the_embedding_mode_runs_no_layer_and_is_behind_each_norm(models, tmp_path):
    upcycle(recipe(tmp_path / "r.yaml", models, gate_mode="cheap_embed"), tmp_path / "out")
    layers = loaded(tmp_path / "out").model.layers
    # The norms of the layers differ, and with them their inputs.
    assert not torch.allclose(layers[0].mlp.gate.weight, layers[1].mlp.gate.weight)


def test_equal_models_under_any_router_are_the_model(models, tmp_path):
    experts = [
        {"source_model": str(models / "base"), "positive_prompts": [prompt]}
        for prompt in PROMPTS.values()
    ]
    result = upcycle(recipe(tmp_path / "r.yaml", models, experts), tmp_path / "out")
    assert result.start.equal_to == "the source"
    assert result.measured is not None
    # Only the order of sums differs.
    assert result.measured < 1e-5


def test_scales_and_noise_of_a_recipe(models, tmp_path):
    experts = [
        {"source_model": str(models / "code"), "residual_scale": 0.5},
        {"source_model": str(models / "prose"), "noise_scale": 0.1},
    ]
    upcycle(recipe(tmp_path / "r.yaml", models, experts, gate_mode="random"), tmp_path / "out")
    made = loaded(tmp_path / "out").model.layers[0].mlp.experts
    code, prose = (loaded(models / name).model.layers[0].mlp for name in ("code", "prose"))
    torch.testing.assert_close(made.down_proj[0], code.down_proj.weight / 2)
    assert torch.equal(made.gate_up_proj[0, :48], code.gate_proj.weight)
    noise = (made.gate_up_proj[1, :48] - prose.gate_proj.weight).detach()
    # 1536 draws: the standard deviation is known to 2% of itself, one in 10,000 is off by 8%.
    assert float(noise.std()) == pytest.approx(0.1, rel=0.08)


def test_a_shared_expert_of_a_recipe_is_weighed_by_its_prompts(models, tmp_path):
    shared = [{"source_model": str(models / "german"), "positive_prompts": ["zwei"]}]
    request = recipe(
        tmp_path / "r.yaml", models, architecture="qwen", shared_experts=shared, experts_per_token=3
    )
    assert upcycle(request, tmp_path / "out").model_type == "qwen2_moe"
    block = loaded(tmp_path / "out").model.layers[0].mlp
    german = loaded(models / "german").model.layers[0].mlp
    assert torch.equal(block.shared_expert.up_proj.weight, german.up_proj.weight)
    assert block.shared_expert_gate.weight.detach().abs().sum() > 0
    assert (block.gate.num_experts, block.gate.top_k) == (3, 3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gate_mode": "hiden"}, "gate_mode 'hiden' is unknown: did you mean hidden"),
        ({"expert_per_token": 2}, "has no field 'expert_per_token'"),
        ({"architecture": "deepseek"}, "glm4_moe has its shared"),
        ({"experts_per_token": 4}, "there are 3 experts"),
        ({"dtype": "int3"}, "dtype 'int3' is unknown"),
        ({"experts": [{"source_model": "nowhere"}]}, "nowhere: no such directory"),
        ({"experts": [{"positive_prompts": ["a"]}]}, r"experts\[0\] lacks source_model"),
        ({"experts": 3}, "not a list"),
    ],
    ids=lambda c: "-".join(c) if isinstance(c, dict) else "",
)
def test_recipes_that_are_wrong(models, tmp_path, change, words):
    with pytest.raises(UserError, match=words):
        upcycle(recipe(tmp_path / "r.yaml", models, **change), tmp_path / "out")


def test_rows_may_be_measured_on_text_by_domain(models, tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for name, text in PROMPTS.items():
        (texts / f"{name}.txt").write_text(f"{text} " * 8)
    others = tuple(str(models / name) for name in PROMPTS)
    options = {"router": "hidden-mean"}
    request = Request("btx", str(models / "base"), others, options, data=(str(texts),))
    upcycle(request, tmp_path / "out")
    base, made = loaded(models / "base"), loaded(tmp_path / "out")
    for number, text in enumerate(PROMPTS.values()):
        seen = []
        base.model.layers[1].mlp.register_forward_pre_hook(
            lambda _, inputs, seen=seen: seen.append(inputs[0][0].detach())
        )
        base(tiny_tokenizer()(f"{text} " * 8, return_tensors="pt").input_ids)
        rows = made.model.layers[1].mlp.gate.weight.detach()
        assert int((rows @ seen[0].mean(0)).argmax()) == number
    prose = replace(request, data=(str(texts / "prose.txt"),))
    with pytest.raises(UserError, match="no text of code"):
        upcycle(prose, tmp_path / "more")


def test_prompts_that_are_missing_or_tell_nothing(models, tmp_path):
    for prompts, words in (([], "no positive prompts"), (["one"], "the same prompts")):
        experts = [
            {"source_model": str(models / name), "positive_prompts": prompts} for name in PROMPTS
        ]
        with pytest.raises(UserError, match=words):
            upcycle(recipe(tmp_path / "r.yaml", models, experts), tmp_path / "out")


def test_models_that_do_not_fit_each_other(models, tmp_path):
    base = str(models / "base")
    wide = write_dense(tmp_path / "wide", dense_config("llama", intermediate_size=64))
    with pytest.raises(UserError, match=r"down_proj.weight is \[32, 64\] in .*wide and \[32, 48\]"):
        upcycle(Request("btx", base, (str(wide), base)), tmp_path / "out")
    other = write_dense(tmp_path / "other", dense_config("qwen3"))
    with pytest.raises(UserError, match=r"is a qwen3 and .* a llama"):
        upcycle(Request("btx", base, (str(other), base)), tmp_path / "out")


def test_models_that_read_other_tokens(models, tmp_path):
    base = str(models / "base")
    other = write_dense(tmp_path / "other", like=models / "base", seed=9)
    file = other / "tokenizer.json"
    file.write_text(file.read_text().replace('"a": ', '"<a>": ', 1))
    with pytest.raises(UserError, match="different tokenizers"):
        upcycle(Request("btx", base, (str(other), base)), tmp_path / "out")
    small = write_dense(tmp_path / "small", dense_config("llama", vocab_size=336))
    with pytest.raises(UserError, match=r"vocabulary of 336 and .* one of 320"):
        upcycle(Request("btx", base, (str(small), base)), tmp_path / "out")


def test_a_missing_tensor_is_named(models, tmp_path):
    from safetensors.torch import load_file, save_file

    broken = write_dense(tmp_path / "broken", like=models / "base", seed=9)
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(UserError, match=r"lacks 1 of .* model\.layers\.1\.mlp\.up_proj\.weight"):
        upcycle(Request("btx", str(models / "base"), (str(broken),) * 2), tmp_path / "out")
