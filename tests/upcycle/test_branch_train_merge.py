"""Branch-Train-Merge: the ensemble and the average by domain posterior."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from moekit.core.errors import UserError
from moekit.core.load import load_language_model
from moekit.evaluate.bits_per_byte import bits_per_byte
from moekit.evaluate.text import Sample
from moekit.upcycle.run import Request, upcycle
from tests.models import write_tiny_model
from tests.upcycle.dense_models import (
    SHAPE,
    TEXTS,
    dense_config,
    logits,
    read,
    tokens,
    write_dense,
)

# Logarithms of sums of exponentials, in float32.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def btm(out, base, others, method="branch-train-merge", data=(), **options):
    others = tuple(map(str, others))
    return upcycle(Request(method, str(base), others, options, data=data), out, check=False)


def likely(model, ids):
    return logits(model, ids).log_softmax(-1)


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """A base and an expert of each domain, trained on its text for a moment."""
    root = tmp_path_factory.mktemp("experts")
    base = write_dense(root / "base")
    for domain, text in TEXTS.items():
        model = AutoModelForCausalLM.from_pretrained(base)
        ids = load_language_model(base).tokenizer(text)["input_ids"][:1024]
        batch = torch.tensor(ids).view(16, 64)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(15):
            loss = model(batch, labels=batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.save_pretrained(root / domain)
        load_language_model(base).tokenizer.save_pretrained(root / domain)
    data = root / "data"
    data.mkdir()
    for domain, text in TEXTS.items():
        (data / f"{domain}.txt").write_text(text)
    return root


@pytest.mark.parametrize("posterior", ["prefix", "last_token"])
def test_identical_experts_are_the_expert(family_of_models, tmp_path, posterior):
    base = family_of_models["base"]
    result = btm(tmp_path / "all", base, [base, base], posterior=posterior)
    assert result.model_type == "moekit_ensemble"
    model = read(tmp_path / "all")
    model.config.prior = [0.7, 0.2, 0.1]
    torch.testing.assert_close(logits(model, tokens()), likely(read(base), tokens()), **CLOSE)


def test_heads_tied_to_embeddings_stay_tied(tmp_path):
    base = write_dense(tmp_path / "base", dense_config(tie_word_embeddings=True))
    btm(tmp_path / "all", base, [base])
    model = load_language_model(tmp_path / "all", dtype="float32").model
    for expert in model.experts:
        assert expert.lm_head.weight is expert.model.embed_tokens.weight
    torch.testing.assert_close(logits(model, tokens()), likely(read(base), tokens()), **CLOSE)


def test_a_one_hot_prior_is_that_expert_and_runs_it_alone(family_of_models, tmp_path):
    btm(tmp_path / "all", family_of_models["base"], [family_of_models["code"]])
    model = read(tmp_path / "all")
    model.config.prior = [0.0, 1.0]
    model.experts[0].forward = None
    expected = likely(read(family_of_models["code"]), tokens())
    torch.testing.assert_close(logits(model, tokens()), expected, **CLOSE)


def test_the_mixture_is_the_sum_of_likelihoods_by_bayes(family_of_models, tmp_path):
    """By the prefix, the likelihood of a text is the prior's mean of the experts' likelihoods."""
    btm(tmp_path / "all", family_of_models["base"], [family_of_models["code"]])
    model, ids = read(tmp_path / "all"), tokens()
    model.config.prior = [0.3, 0.7]

    def of_text(said):
        return said[:, :-1].gather(-1, ids[:, 1:, None])[..., 0].sum(1)

    each = torch.stack(
        [of_text(likely(read(family_of_models[name]), ids)) for name in ("base", "code")]
    )
    prior = torch.tensor([[0.3], [0.7]]).log()
    mixed = of_text(logits(model, ids))
    torch.testing.assert_close(mixed, (each + prior).logsumexp(0), **CLOSE)
    assert (mixed >= (each.min(0).values - 1e-3)).all()


def test_by_the_last_token_each_step_is_weighed_by_the_one_before(family_of_models, tmp_path):
    btm(
        tmp_path / "all",
        family_of_models["base"],
        [family_of_models["code"]],
        posterior="last_token",
    )
    ids = tokens()
    said = torch.stack([likely(read(family_of_models[n]), ids) for n in ("base", "code")])
    made = logits(read(tmp_path / "all"), ids)
    for t in range(1, ids.shape[1]):
        before = said[:, torch.arange(2), t - 1, ids[:, t]]
        weights = before.log_softmax(0)
        expected = (said[:, :, t] + weights[..., None]).logsumexp(0)
        torch.testing.assert_close(made[:, t], expected, **CLOSE)
    torch.testing.assert_close(made[:, 0], (said[:, :, 0] + math.log(0.5)).logsumexp(0), **CLOSE)


@pytest.mark.parametrize("posterior", ["prefix", "last_token"])
def test_decoding_keeps_the_posterior(family_of_models, tmp_path, posterior):
    others = [family_of_models["code"]]
    btm(tmp_path / "all", family_of_models["base"], others, posterior=posterior)
    model, ids = read(tmp_path / "all"), tokens()
    with torch.inference_mode():
        start = model(ids[:, :6], use_cache=True)
        cache, pieces = start.past_key_values, [start.logits]
        pieces += [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(6, 12)]
    torch.testing.assert_close(torch.cat(pieces, 1), logits(model, ids), **CLOSE)
    made = model.generate(ids, max_new_tokens=3, do_sample=False)
    again = ids
    for _ in range(3):
        again = torch.cat([again, logits(model, again)[:, -1:].argmax(-1)], 1)
    assert torch.equal(made, again)
    assert model.generate(ids, max_new_tokens=3, num_beams=2, do_sample=False).shape == (2, 15)


def test_padding_in_front_is_no_evidence(family_of_models, tmp_path):
    btm(tmp_path / "all", family_of_models["base"], [family_of_models["code"]])
    model, ids = read(tmp_path / "all"), tokens()
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], 1)
    mask = torch.cat([torch.zeros(2, 3), torch.ones(2, 12)], 1).long()
    with torch.inference_mode():
        made = model(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    torch.testing.assert_close(made.logits[:, 3:], logits(model, ids), **CLOSE)


def test_the_posterior_finds_the_domain_and_the_ensemble_is_near_its_expert(experts, tmp_path):
    btm(tmp_path / "all", experts / "code", [experts / "prose"])
    loaded = load_language_model(tmp_path / "all", "float32")
    for place, domain in enumerate(TEXTS):
        ids = torch.tensor([loaded.tokenizer(TEXTS[domain])["input_ids"][:64]])
        with torch.inference_mode():
            posterior = loaded.model.posterior_of(ids)[0, -1]
        assert float(posterior[place]) > 0.99
        samples = [Sample(TEXTS[domain][:400], domain)]
        mixed = bits_per_byte(loaded.model, loaded.tokenizer, samples, context=128, stride=64)
        own = load_language_model(experts / domain, "float32")
        alone = bits_per_byte(own.model, own.tokenizer, samples, context=128, stride=64)
        # A prior of a half costs at most one bit a window, and there are few.
        assert mixed.mean <= alone.mean + 0.05


@pytest.mark.parametrize(("domain", "place"), [("code", 0), ("prose", 1)])
def test_the_prior_of_a_text_is_its_expert_and_so_is_the_average(experts, tmp_path, domain, place):
    data = (str(experts / "data" / f"{domain}.txt"),)
    result = btm(tmp_path / "all", experts / "code", [experts / "prose"], data=data, top_k=1)
    assert result.numbers["prior"] == {d: float(d == domain) for d in ("code", "prose")}
    btm(
        tmp_path / "mean",
        experts / "code",
        [experts / "prose"],
        "branch-train-average",
        data=data,
        top_k=1,
    )
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "mean")
    expected = AutoModelForCausalLM.from_pretrained(experts / domain)
    assert torch.equal(logits(stock, tokens()), logits(expected, tokens()))


def test_experts_of_two_families_share_a_vocabulary(family_of_models, tmp_path):
    other = write_dense(tmp_path / "llama", LlamaConfig(**{**SHAPE, "num_hidden_layers": 3}))
    btm(tmp_path / "all", family_of_models["base"], [other])
    model, ids = read(tmp_path / "all"), tokens()
    model.config.prior = [0.0, 1.0]
    torch.testing.assert_close(logits(model, ids), likely(read(other), ids), **CLOSE)
    with torch.inference_mode():
        start = model(ids[:, :6], use_cache=True)
        rest = model(ids[:, 6:], past_key_values=start.past_key_values).logits
    torch.testing.assert_close(rest, logits(model, ids)[:, 6:], **CLOSE)


def test_experts_may_be_mixtures_themselves(family_of_models, tmp_path):
    moe = write_tiny_model(tmp_path / "moe")
    btm(tmp_path / "all", family_of_models["base"], [moe])
    model, ids = read(tmp_path / "all"), tokens()
    model.config.prior = [0.0, 1.0]
    torch.testing.assert_close(logits(model, ids), likely(read(moe), ids), **CLOSE)


def test_the_files_say_what_loads_them(family_of_models, tmp_path):
    btm(tmp_path / "all", family_of_models["base"], [family_of_models["code"]])
    config = json.loads((tmp_path / "all/config.json").read_text())
    assert config["names"] == ["base", "code"]
    assert "No class of transformers holds an ensemble" in (tmp_path / "all/README.md").read_text()


@pytest.mark.parametrize(
    ("options", "words"),
    [({"posterior": "mean"}, "prefix and last_token"), ({"top_k": 3}, "there are 2 experts")],
)
def test_wrong_options(family_of_models, tmp_path, options, words):
    with pytest.raises(UserError, match=words):
        btm(tmp_path / "x", family_of_models["base"], [family_of_models["code"]], **options)
