"""Twin-Merging and FlexMoRE: the checks of both methods, and the way back to stock classes."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from moekit.core.errors import UserError
from moekit.ops.lowrank import balanced
from moekit.ops.routed_lowrank import routed_low_rank, routed_low_rank_naive
from moekit.upcycle.model.residues import MatrixResidues
from moekit.upcycle.run import Request, upcycle
from tests.upcycle.dense_models import dense_config, logits, read, tokens, write_dense

# Products of factors instead of the matrix itself, through two layers.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def made(out, method, base, others=(), data=(), check=False, **options):
    others, data = tuple(map(str, others)), tuple(map(str, data))
    return upcycle(Request(method, str(base), others, options, data=data), out, check=check)


def twin(out, models, **options):
    others = [models["code"], models["prose"]]
    options = {"epochs": 2, "examples": 6, **options}
    return made(out, "twin-merging", models["base"], others, [models["texts"]], **options)


def flexmore(out, models, **options):
    others = [models["ffn-code"], models["ffn-prose"]]
    return made(out, "flexmore", models["base"], others, **options)


def with_gates(model, *gates):
    """The model with its router replaced by one that always says `gates`."""

    def always(module, args, output):
        return torch.tensor(gates).expand(*output.shape)

    model.part.router.register_forward_hook(always)
    return model


def test_kernel_equals_every_matrix_written_out():
    draw = torch.Generator().manual_seed(0)
    expert_of = torch.tensor([0, 0, 0, 2, 2, 3])
    right = torch.randn(6, 5, generator=draw)
    left = torch.randn(7, 6, generator=draw)
    x, gates = torch.randn(2, 3, 5, generator=draw), torch.rand(2, 3, 4, generator=draw)
    fast = routed_low_rank(x, right, left, expert_of, gates)
    naive = routed_low_rank_naive(x, right, left, expert_of, gates)
    torch.testing.assert_close(fast, naive, rtol=1e-5, atol=1e-5)
    alone = gates.mean(1, keepdim=True)
    torch.testing.assert_close(
        routed_low_rank(x, right, left, expert_of, alone),
        routed_low_rank_naive(x, right, left, expert_of, alone.expand_as(gates)),
        rtol=1e-5,
        atol=1e-5,
    )


def test_error_falls_with_the_rank_and_is_the_tail_energy():
    matrix = torch.randn(12, 20, generator=torch.Generator().manual_seed(1))
    squares = torch.linalg.svdvals(matrix).square()
    errors = [
        float((matrix - balanced(matrix, rank).product()).square().sum()) for rank in range(1, 13)
    ]
    assert errors == sorted(errors, reverse=True)
    for rank, error in enumerate(errors, 1):
        assert error == pytest.approx(float(squares[rank:].sum()), abs=1e-3)


def test_factors_larger_than_the_matrix_are_kept_whole():
    residues = MatrixResidues((6, 8), [1, 6, 0])
    assert residues.whole_of == [1]
    assert residues.left.shape == (6, 1)
    assert residues.whole.shape == (1, 6, 8)
    assert [residues.has(e) for e in range(3)] == [True, True, False]


def test_twin_at_full_rank_with_one_gate_is_the_fine_tune(family_of_models, tmp_path):
    twin(tmp_path / "twin", family_of_models, share=1.0)
    for place, name in enumerate(("code", "prose")):
        model = with_gates(read(tmp_path / "twin"), *[float(place == e) for e in range(2)])
        expected = logits(read(family_of_models[name]), tokens())
        torch.testing.assert_close(logits(model, tokens()), expected, **CLOSE)


def test_twin_of_rank_zero_is_the_merged_model(family_of_models, tmp_path):
    twin(tmp_path / "twin", family_of_models, share=0.0)
    model = with_gates(read(tmp_path / "twin"), 0.5, 0.5)
    base = AutoModelForCausalLM.from_pretrained(family_of_models["base"])
    others = [
        AutoModelForCausalLM.from_pretrained(family_of_models[n]).state_dict()
        for n in ("code", "prose")
    ]
    state = base.state_dict()
    # Vectors are kept whole at every rank.
    for name, value in state.items():
        whole = value.ndim == 1
        moved = sum(other[name] - value for other in others)
        value += (0.5 if whole else 0.3) * moved
    base.load_state_dict(state)
    torch.testing.assert_close(logits(model, tokens()), logits(base, tokens()), **CLOSE)


def test_twin_of_one_fine_tune_twice_ignores_the_gates(family_of_models, tmp_path):
    models = {**family_of_models, "prose": family_of_models["code"]}
    twin(tmp_path / "twin", models, share=0.3, domains="code prose")
    first = logits(with_gates(read(tmp_path / "twin"), 1.0, 0.0), tokens())
    second = logits(with_gates(read(tmp_path / "twin"), 0.25, 0.75), tokens())
    torch.testing.assert_close(first, second, **CLOSE)


def test_twin_served_by_factors_is_twin_in_the_weights(family_of_models, tmp_path):
    twin(tmp_path / "twin", family_of_models, share=0.4)
    made(tmp_path / "dense", "fold-residues", tmp_path / "twin", gates="0.3 0.7")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert type(stock).__name__ == "Qwen3ForCausalLM"
    model = with_gates(read(tmp_path / "twin"), 0.3, 0.7)
    torch.testing.assert_close(logits(model, tokens()), logits(stock, tokens()), **CLOSE)


def test_twin_of_tied_and_biased_models(tmp_path, family_of_models):
    config = dense_config("llama", tie_word_embeddings=True, attention_bias=True)
    base = write_dense(tmp_path / "base", config)
    models = {
        "base": base,
        "code": write_dense(tmp_path / "code", like=base, seed=1),
        "prose": write_dense(tmp_path / "prose", like=base, seed=2),
        "texts": family_of_models["texts"],
    }
    twin(tmp_path / "twin", models, share=1.0)
    model = with_gates(read(tmp_path / "twin"), 0.0, 1.0)
    torch.testing.assert_close(
        logits(model, tokens()), logits(read(models["prose"]), tokens()), **CLOSE
    )


def test_a_prefix_decides_and_the_prompt_keeps_deciding(family_of_models, tmp_path):
    twin(tmp_path / "twin", family_of_models)
    model, ids = read(tmp_path / "twin"), tokens()
    assert model.causal
    torch.testing.assert_close(logits(model, ids)[:, :7], logits(model, ids[:, :7]), **CLOSE)
    grown = model.generate(ids, max_new_tokens=4, do_sample=False)
    with torch.inference_mode():
        read_prompt = model(ids, use_cache=True)
        cache = read_prompt.past_key_values
        gates = cache.residue_gates.clone()
        model(grown[:, 12:13], past_key_values=cache)
    assert torch.equal(cache.residue_gates, gates)
    torch.testing.assert_close(gates.sum(-1), torch.ones(2, 1), rtol=1e-5, atol=1e-5)


def test_a_model_routed_by_whole_prompts_says_so(family_of_models, tmp_path):
    result = twin(tmp_path / "twin", family_of_models, pool="sequence")
    assert any("eval refuses" in note for note in result.notes)
    assert not read(tmp_path / "twin").causal


def test_the_router_tells_the_domains_apart(family_of_models, tmp_path):
    result = twin(tmp_path / "twin", family_of_models, epochs=40, learning_rate=2e-3)
    # One window in ten is held out; by chance it would be a half.
    assert result.numbers["router_accuracy"] > 0.9


def test_flexmore_experts_at_full_rank_are_the_fine_tunes(family_of_models, tmp_path):
    flexmore(tmp_path / "flex", family_of_models, ranks=32, top_k=1)
    for expert, name in enumerate(("base", "ffn-code", "ffn-prose")):
        model = read(tmp_path / "flex")
        for block in model.base.model.layers:
            always = torch.eye(3)[expert]
            block.mlp.router.register_forward_hook(
                lambda m, a, o, always=always: always.expand_as(o)
            )
        expected = logits(read(family_of_models[name]), tokens())
        torch.testing.assert_close(logits(model, tokens()), expected, **CLOSE)


def test_flexmore_of_mixed_ranks_expands_to_a_stock_moe(family_of_models, tmp_path):
    flexmore(
        tmp_path / "flex",
        family_of_models,
        ranks="4 20",
        data=[family_of_models["texts"]],
        domains="code prose",
    )
    result = made(tmp_path / "stock", "expand-residues", tmp_path / "flex", check=True)
    assert result.measured <= result.start.tolerance
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    assert type(stock).__name__ == "Qwen3MoeForCausalLM"
    assert stock.config.num_experts == 3
    ids = tokens()
    torch.testing.assert_close(logits(read(tmp_path / "flex"), ids), logits(stock, ids), **CLOSE)


def test_flexmore_folds_one_expert_and_no_mean_of_them(family_of_models, tmp_path):
    flexmore(tmp_path / "flex", family_of_models, ranks=32)
    made(tmp_path / "dense", "fold-residues", tmp_path / "flex", expert="ffn-prose")
    torch.testing.assert_close(
        logits(read(tmp_path / "dense"), tokens()),
        logits(read(family_of_models["ffn-prose"]), tokens()),
        **CLOSE,
    )
    with pytest.raises(UserError, match="fold one expert"):
        made(tmp_path / "mean", "fold-residues", tmp_path / "flex", gates="0 0.5 0.5")


def test_a_router_with_a_bias_is_no_stock_moe(family_of_models, tmp_path):
    flexmore(tmp_path / "flex", family_of_models, ranks=4)
    model = read(tmp_path / "flex")
    with torch.no_grad():
        model.base.model.layers[1].mlp.router.bias[0] = -0.5
    model.save_pretrained(tmp_path / "biased")
    with pytest.raises(UserError, match="layer 1 has a bias"):
        made(tmp_path / "stock", "expand-residues", tmp_path / "biased")


def test_a_fine_tune_that_moved_more_than_its_ffns_is_named(family_of_models, tmp_path):
    with pytest.raises(UserError, match=r"weight of .*code differs"):
        made(
            tmp_path / "flex",
            "flexmore",
            family_of_models["base"],
            [family_of_models["ffn-code"], family_of_models["code"]],
        )
    assert not (tmp_path / "flex").exists()


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("flexmore", {"ranks": "1 2 3"}, "one for each of 2 experts"),
        ("flexmore", {"ranks": "many"}, "whole numbers"),
        ("flexmore", {"top_k": 4}, "1 to 3 experts"),
        ("twin-merging", {"share": 1.5}, "share is 1.5"),
        ("twin-merging", {"pool": "mean"}, "prefix and sequence"),
        ("twin-merging", {"domains": "code"}, "1 domains for 2 experts"),
    ],
)
def test_wrong_options(family_of_models, tmp_path, method, options, words):
    with pytest.raises(UserError, match=words):
        {"flexmore": flexmore, "twin-merging": twin}[method](
            tmp_path / "out", family_of_models, **options
        )


def test_the_files_say_what_loads_them(family_of_models, tmp_path):
    flexmore(tmp_path / "flex", family_of_models)
    config = json.loads((tmp_path / "flex/config.json").read_text())
    assert config["model_type"] == "moekit_upcycled"
    assert config["architectures"] == ["UpcycledForCausalLM"]
    assert "No class of transformers holds it" in (tmp_path / "flex/README.md").read_text()
