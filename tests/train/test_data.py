"""Packing and mixing: every window is real text, in proportion, reproducible from its number."""

import json
from collections import Counter

import numpy as np
import pytest

from moekit.core.errors import UserError
from moekit.train.data import Domain, PackedMix, mixing_weights, read_domains, tokenize_domains
from tests.models import tiny_tokenizer


def domain(name: str, size: int, first: int) -> Domain:
    return Domain(name, np.arange(first, first + size, dtype=np.int32), size)


MIX = [domain("a", 1000, 0), domain("b", 400, 5000)]


def test_windows_are_contiguous_and_of_their_domain() -> None:
    mix = PackedMix(MIX, mixing_weights(MIX, None, 1.0), 16, seed=4)
    for number in range(200):
        tokens, index = mix.window(number)
        assert len(tokens) == 17
        assert (np.diff(tokens) == 1).all()
        assert (tokens[0] >= 5000) == (index == 1)


def test_an_epoch_visits_every_window_once_before_any_comes_again() -> None:
    mix = PackedMix([MIX[0]], np.ones(1), 16, seed=4)
    per_epoch = (1000 - 1) // 16 - 1
    starts = [int(mix.window(number)[0][0]) for number in range(2 * per_epoch)]
    for epoch in (starts[:per_epoch], starts[per_epoch:]):
        assert len(set(epoch)) == per_epoch
    assert starts[:per_epoch] != starts[per_epoch:]


def test_a_window_depends_on_its_number_alone() -> None:
    weights = mixing_weights(MIX, {"a": 1, "b": 3}, 1.0)
    forward = [PackedMix(MIX, weights, 16, seed=1).window(n)[0].tolist() for n in range(50)]
    mix = PackedMix(MIX, weights, 16, seed=1)
    mix.window(9000)
    backward = [mix.window(n)[0].tolist() for n in reversed(range(50))]
    assert forward == backward[::-1]
    other = [PackedMix(MIX, weights, 16, seed=2).window(n)[0].tolist() for n in range(50)]
    assert other != forward


def test_domains_come_in_the_asked_proportion() -> None:
    mix = PackedMix(MIX, mixing_weights(MIX, {"a": 1, "b": 3}, 1.0), 16, seed=1)
    counts = Counter(mix.window(number)[1] for number in range(4000))
    # Binomial with p = 0.75: four standard deviations are 0.027.
    assert counts[1] / 4000 == pytest.approx(0.75, abs=0.028)


def test_weights_by_exponent() -> None:
    assert mixing_weights(MIX, None, 0.0).tolist() == [0.5, 0.5]
    assert mixing_weights(MIX, None, 1.0)[0] == pytest.approx(1000 / 1400)


@pytest.mark.parametrize(
    ("weights", "message"),
    [({"a": 1}, "without a weight \\['b'\\]"), ({"a": 1, "b": -1}, "negative")],
)
def test_bad_weights(weights: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        mixing_weights(MIX, weights, 1.0)


def test_a_domain_shorter_than_a_window_is_refused_with_numbers() -> None:
    with pytest.raises(UserError, match="400 tokens, fewer than one window of 513"):
        PackedMix(MIX[1:], np.ones(1), 512, seed=0)


def test_reading_and_tokenizing(tmp_path) -> None:
    documents = ["one", "zwei drei", "四"]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
    (tmp_path / "mixed.train.jsonl").write_text(lines)
    texts = read_domains(tmp_path, "*.train.jsonl")
    assert texts == {"mixed": documents}
    tokenizer = tiny_tokenizer()
    (found,) = tokenize_domains(texts, tokenizer, tokenizer.eos_token_id)
    ends = np.flatnonzero(found.tokens == tokenizer.eos_token_id)
    assert ends[0] == 0
    assert len(ends) == 3
    pieces = np.split(found.tokens, ends[1:])
    assert [tokenizer.decode(piece[1:]) for piece in pieces] == documents
    assert found.num_bytes == len("".join(documents).encode())


def test_bad_data(tmp_path) -> None:
    with pytest.raises(UserError, match=r"no file matches '\*.train.jsonl'"):
        read_domains(tmp_path, "*.train.jsonl")
    (tmp_path / "x.train.jsonl").write_text('{"text": "a"}\n{"body": 1}\n')
    with pytest.raises(UserError, match=r"x\.train\.jsonl:2"):
        read_domains(tmp_path, "*.train.jsonl")
