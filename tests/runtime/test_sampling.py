from collections import Counter

import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from moekit.core.errors import UserError
from moekit.runtime.sampling import Sampler, Sampling, choose_all, token_logprobs

VOCAB = 50


@pytest.fixture
def logits():
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(1)) * 2


def drawn(logits: torch.Tensor, sampling: Sampling, count: int) -> Counter[int]:
    return Counter(Sampler(sampling, [0], sequence).choose(logits) for sequence in range(count))


@pytest.mark.parametrize(
    ("fields", "warpers"),
    [
        ({}, []),
        ({"temperature": 0.7}, [TemperatureLogitsWarper(0.7)]),
        ({"top_k": 5}, [TopKLogitsWarper(5)]),
        ({"top_p": 0.8}, [TopPLogitsWarper(0.8)]),
        ({"min_p": 0.1}, [MinPLogitsWarper(0.1)]),
        (
            {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
            [
                TemperatureLogitsWarper(1.5),
                TopKLogitsWarper(20),
                TopPLogitsWarper(0.9),
                MinPLogitsWarper(0.05),
            ],
        ),
    ],
)
def test_draws_from_the_distribution_of_transformers(logits, fields, warpers):
    count = 4000
    expected = LogitsProcessorList(warpers)(None, logits[None])[0].softmax(0)
    found = drawn(logits, Sampling(**fields), count)
    frequency = torch.tensor([found[token] / count for token in range(VOCAB)])
    assert not frequency[expected == 0].any()
    # Four standard deviations of a share in `count` draws, over 50 tokens.
    assert (frequency - expected).abs().max() < 4 * 0.5 / count**0.5
    assert len(found) > 0.6 * int((expected > 1 / count).sum())


def test_top_p_of_a_flat_large_vocabulary_reaches_its_share():
    """More tokens than are looked at first, and all of them."""
    flat = torch.zeros(5000)
    assert len(drawn(flat, Sampling(top_p=0.5), 3000)) > 1000
    assert max(drawn(flat, Sampling(top_p=0.9999), 3000)) > 4096
    ids = set(drawn(flat, Sampling(top_p=0.01), 3000))
    assert len(ids) in (50, 51)  # 50 shares of 1/5000 sum to 0.01 give or take rounding


def test_draw_is_keyed_by_seed_sequence_and_position(logits):
    def text(seed: int, sequence: int, prompt: list[int]) -> list[int]:
        sampler = Sampler(Sampling(seed=seed), prompt, sequence)
        return [sampler.choose(logits) for _ in range(20)]

    whole = text(1, 0, [1, 2])
    assert text(1, 0, [1, 2]) == whole
    assert text(2, 0, [1, 2]) != whole
    assert text(1, 1, [1, 2]) != whole
    assert text(1, 0, [1, 2, *whole[:5]])[:15] == whole[5:]


def test_temperature_zero_and_the_tiniest_take_the_likeliest(logits):
    for temperature in (0, 1e-300):
        assert set(drawn(logits, Sampling(temperature=temperature), 5)) == {int(logits.argmax())}


def test_penalties_and_bias():
    logits = torch.tensor([2.0, 1.9, -1.0, -1.5])
    greedy = Sampling(temperature=0, presence_penalty=0.5)
    sampler = Sampler(greedy, [0, 0, 0])
    assert [sampler.choose(logits) for _ in range(3)] == [0, 1, 0]
    sampler = Sampler(Sampling(temperature=0, frequency_penalty=1.0), [])
    assert [sampler.choose(logits) for _ in range(6)] == [0, 1, 0, 1, 0, 1]
    assert Sampler(Sampling(temperature=0, logit_bias={2: 100.0}), []).choose(logits) == 2
    prompt = [0, 2, 2]
    sampler = Sampler(Sampling(temperature=0, repetition_penalty=1.3), prompt)
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([prompt]), logits[None])[0]
    assert sampler.choose(logits) == int(expected.argmax()) == 1
    assert logits.tolist() == pytest.approx([2.0, 1.9, -1.0, -1.5])


def test_batch_chooses_as_each_alone(logits):
    settings = [Sampling(temperature=0), Sampling(seed=3), Sampling(temperature=0, top_k=3)]
    rows = torch.stack([logits, logits.flip(0), -logits])
    alone = [Sampler(s, [1, 2]).choose(row) for s, row in zip(settings, rows, strict=True)]
    samplers = [Sampler(s, [1, 2]) for s in settings]
    assert choose_all(samplers, rows) == alone


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_give_no_token(logits, wrong):
    logits[3] = wrong
    with pytest.raises(FloatingPointError):
        choose_all([Sampler(Sampling(), [])], logits[None])


def test_logprobs_are_of_the_models_distribution(logits):
    rows = torch.stack([logits, -logits])
    first, second = token_logprobs(rows, [4, 7], top=VOCAB)
    assert sum(torch.tensor([p for _, p in first.top]).exp().tolist()) == pytest.approx(1, abs=1e-5)
    assert first.logprob == pytest.approx(dict(first.top)[4])
    assert second.token == 7
    assert [p for _, p in second.top] == sorted((p for _, p in second.top), reverse=True)
    assert token_logprobs(rows, [4, 7], top=0)[0].top == []


@pytest.mark.parametrize(
    "fields",
    [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"min_p": 2}, {"repetition_penalty": 0}],
)
def test_values_out_of_range_are_refused(fields):
    with pytest.raises(UserError, match=next(iter(fields))):
        Sampling(**fields)
