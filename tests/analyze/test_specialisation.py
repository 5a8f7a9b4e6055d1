import numpy as np
import pytest

from moekit.analyze.specialisation import specialisation
from moekit.core.errors import UserError

from .traces import make_trace, random_ids


def two_domains(samples, length, preference, seed=0):
    """Layer 0 prefers by domain; layer 1 does not look."""
    steps = samples * length
    domain = np.repeat(np.arange(samples) % 2, length)
    bias = np.zeros((steps, 2, 4))
    bias[:, 0] = np.array(preference)[domain]
    names = ["law" if i % 2 else "code" for i in range(samples)]
    ids = random_ids(steps, 4, 1, layers=2, seed=seed, preference=bias)
    return make_trace(ids, 4, lengths=[length] * samples, domains=names)


def test_experts_of_one_domain_each():
    far = [[50, 50, 0, 0], [0, 0, 50, 50]]
    result = specialisation(two_domains(20, 50, far))
    assert result.rows[0][1] == pytest.approx(1, abs=1e-9)
    assert result.rows[0][3] == pytest.approx(1 / 201)
    pairs = {(s["expert"], s["domain"]) for s in result.detail["specialists"][0]}
    assert pairs == {(0, "code"), (1, "code"), (2, "law"), (3, "law")}
    # Independent of the domain: nothing is found.
    assert result.rows[1][3] > 0.05
    assert result.detail["specialists"][1] == []
    assert result.summary["significant_layers"] == 1


def test_samples_that_differ_are_no_specialisation():
    """Each sample has its own taste, the same in both domains: tokens alone would look certain."""
    rng = np.random.default_rng(0)
    tastes = np.repeat(3 * rng.normal(size=(40, 1, 8)), 50, axis=0)
    ids = random_ids(2000, 8, 2, preference=tastes)
    names = ["a" if i % 2 else "b" for i in range(40)]
    trace = make_trace(ids, 8, lengths=[50] * 40, domains=names)
    assert specialisation(trace).rows[0][3] > 0.05


def test_chance_is_hit_as_often_as_it_should():
    p = [
        specialisation(two_domains(16, 30, np.zeros((2, 4)), seed=seed), permutations=99).rows[0][3]
        for seed in range(40)
    ]
    # 40 tests at 5 %: more than 6 has probability 0.3 %.
    assert sum(value <= 0.05 for value in p) <= 6


@pytest.mark.parametrize(
    ("lengths", "domains", "message"),
    [
        ([200], ["en"], "one domain .en."),
        ([100, 90, 5, 5], ["en", "en", "fr", "fr"], "'fr' has 10 tokens in 2 samples"),
        ([100, 90, 10], ["en", "en", "fr"], "'fr' has 10 tokens in 1 sample"),
    ],
)
def test_too_little_text_is_refused(lengths, domains, message):
    trace = make_trace(random_ids(200, 4, 2), 4, lengths=lengths, domains=domains)
    with pytest.raises(UserError, match=message):
        specialisation(trace, min_tokens=50)


def test_domains_with_too_little_text_are_left_out():
    far = [[50, 50, 0, 0], [0, 0, 50, 50]]
    whole = two_domains(20, 50, far)
    ids = np.concatenate([whole.layer(0).topk_ids.numpy(), np.zeros((30, 1), dtype=int)])
    domains = [sample.domain for sample in whole.samples]
    more = make_trace(ids, 4, lengths=[50] * 20 + [30], domains=[*domains, "few"])
    result = specialisation(more)
    assert result.detail["domains"] == ["code", "law"]
    assert result.rows[0] == specialisation(whole).rows[0]
    assert result.notes == [
        "left out: domain 'few' has 30 tokens in 1 sample: too little to compare, which needs 200 "
        "in 2 or more; record more, or lower min_tokens"
    ]
