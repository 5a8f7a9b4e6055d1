"""BAM: attention experts, with keys and values of their own or shared."""

import pytest
import torch

from moekit.core.errors import UserError
from moekit.core.view import MoEView
from moekit.upcycle.run import Request, upcycle
from tests.upcycle.dense_models import dense_config, logits, read, tokens, write_dense

# Sums over experts in another order, through two layers.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def bam(out, base, others, **options):
    method = "bam-shared-kv" if options.pop("shared", False) else "bam"
    return upcycle(Request(method, str(base), tuple(map(str, others)), options), out, check=False)


def attention_of(model):
    return [layer.self_attn for layer in model.base.model.layers]


@pytest.mark.parametrize("shared", [False, True])
def test_branches_equal_to_the_seed_compute_what_it_does(family_of_models, tmp_path, shared):
    base = family_of_models["base"]
    bam(tmp_path / "bam", base, [base, base], gate="one", shared=shared)
    torch.testing.assert_close(
        logits(read(tmp_path / "bam"), tokens()), logits(read(base), tokens()), **CLOSE
    )


def test_the_chosen_ffn_counts_by_its_probability(family_of_models, tmp_path):
    base = family_of_models["base"]
    bam(tmp_path / "bam", base, [base], router="zero")
    model, dense = read(tmp_path / "bam"), read(base)
    x = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        half = model.base.model.layers[0].mlp(x)
        whole = dense.model.layers[0].mlp(x)
    torch.testing.assert_close(half, whole / 2, rtol=1e-5, atol=1e-6)


def test_one_hot_gates_give_the_attention_of_one_model(family_of_models, tmp_path):
    others = [family_of_models["code"], family_of_models["prose"]]
    bam(tmp_path / "bam", family_of_models["base"], others)
    x = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0))
    for expert, name in enumerate(("base", "code", "prose")):
        model, dense = read(tmp_path / "bam"), read(family_of_models[name])
        with torch.inference_mode():
            positions = model.base.model.rotary_emb(x, torch.arange(6)[None])
            one_hot = torch.eye(3)[expert]
            mixed = attention_of(model)[1]
            mixed.gates = lambda hidden, g=one_hot: g.expand(*hidden.shape[:-1], 3)
            got = mixed(x, position_embeddings=positions, attention_mask=None)[0]
            alone = dense.model.layers[1].self_attn
            want = alone(x, position_embeddings=positions, attention_mask=None)[0]
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_sharing_equal_keys_and_values_changes_nothing(family_of_models, tmp_path):
    def moves(name):
        return not any(part in name for part in ("k_proj", "v_proj", "k_norm"))

    base = family_of_models["base"]
    other = write_dense(tmp_path / "other", like=base, seed=5, moves=moves)
    bam(tmp_path / "own", base, [other])
    bam(tmp_path / "one", base, [other], shared=True)
    own, one = read(tmp_path / "own"), read(tmp_path / "one")
    torch.testing.assert_close(logits(own, tokens()), logits(one, tokens()), **CLOSE)
    assert len(one.state_dict()) < len(own.state_dict())


@pytest.mark.parametrize("shared", [False, True])
def test_decoding_reads_its_own_caches(family_of_models, tmp_path, shared):
    others = [family_of_models["code"], family_of_models["prose"]]
    bam(tmp_path / "bam", family_of_models["base"], others, shared=shared)
    model, ids = read(tmp_path / "bam"), tokens()
    with torch.inference_mode():
        read_prompt = model(ids[:, :8], use_cache=True)
        cache, pieces = read_prompt.past_key_values, [read_prompt.logits]
        pieces += [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(8, 12)]
    torch.testing.assert_close(torch.cat(pieces, 1), logits(model, ids), **CLOSE)
    assert len(cache.layers) == (2 if shared else 6)


def test_norms_and_embeddings_are_means(family_of_models, tmp_path):
    base, other = family_of_models["base"], family_of_models["code"]
    bam(tmp_path / "bam", base, [other])
    name = "model.embed_tokens.weight"
    made = read(tmp_path / "bam").state_dict()[f"base.{name}"]
    mean = (read(base).state_dict()[name] + read(other).state_dict()[name]) / 2
    torch.testing.assert_close(made, mean, rtol=0, atol=1e-7)


def test_its_feed_forward_experts_are_seen_and_traced(family_of_models, tmp_path):
    bam(tmp_path / "bam", family_of_models["base"], [family_of_models["code"]])
    model = read(tmp_path / "bam")
    view = MoEView(model)
    assert [(layer.num_experts, layer.top_k) for layer in view] == [(2, 1), (2, 1)]
    with view.trace() as trace:
        logits(model, tokens())
    assert len(trace) == tokens().numel()


def test_a_parallel_block_stays_one(tmp_path):
    """In Cohere's layers both branches read the same input, as in the paper."""
    from transformers import CohereConfig

    shape = {k: v for k, v in dense_config().to_dict().items() if k in SHAPE}
    base = write_dense(tmp_path / "base", CohereConfig(**shape))
    bam(tmp_path / "bam", base, [base], gate="one")
    torch.testing.assert_close(
        logits(read(tmp_path / "bam"), tokens()), logits(read(base), tokens()), **CLOSE
    )


def test_models_of_other_shapes_are_refused(family_of_models, tmp_path):
    wide = write_dense(tmp_path / "wide", dense_config(intermediate_size=64))
    with pytest.raises(UserError, match=r"shape \[32, 48\] .* shape \[32, 64\]"):
        bam(tmp_path / "bam", family_of_models["base"], [wide])
    with pytest.raises(UserError, match="--from"):
        bam(tmp_path / "bam", family_of_models["base"], [])


SHAPE = {
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
}
