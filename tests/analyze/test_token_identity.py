import numpy as np
import pytest

from moekit.analyze.token_identity import token_identity
from moekit.core.errors import UserError

from .traces import make_trace, random_ids

STEPS, VOCAB, EXPERTS = 6000, 40, 8


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, VOCAB, STEPS)


def experts_of(keys):
    """A fixed random pair of experts for every key."""
    table = random_ids(int(keys.max()) + 1, EXPERTS, 2, seed=5)[:, 0]
    return table[keys]


def traced(ids, tokens):
    return make_trace(ids, EXPERTS, tokens=tokens, lengths=[60] * (STEPS // 60))


def test_router_that_reads_the_token_only(tokens):
    result = token_identity(traced(experts_of(tokens), tokens))
    row = dict(zip(result.columns, result.rows[0], strict=True))
    assert row["token"] == pytest.approx(1)
    assert row["pair"] == pytest.approx(1)
    assert row["early"] == pytest.approx(1)
    assert abs(row["position"]) < 0.05
    assert abs(row["shuffled"]) < 0.05


def test_random_router_depends_on_nothing(tokens):
    result = token_identity(traced(random_ids(STEPS, EXPERTS, 2), tokens))
    for name in ("token", "position", "early", "late", "shuffled"):
        # The estimator is unbiased; its spread here is about 0.01.
        assert abs(result.column(name)[0]) < 0.05


def test_router_that_reads_the_token_before(tokens):
    pair = tokens * VOCAB + np.roll(tokens, 1)
    result = token_identity(traced(experts_of(pair), tokens))
    assert result.column("pair")[0] > 0.95
    assert result.column("token")[0] < 0.1
    assert result.summary["context"] > 0.85


def test_router_that_reads_the_position(tokens):
    place = np.arange(STEPS) % 60
    result = token_identity(traced(experts_of(place), tokens))
    assert result.column("position")[0] == pytest.approx(1)
    assert abs(result.column("token")[0]) < 0.05


def test_identity_that_fades_with_context(tokens):
    random = random_ids(STEPS, EXPERTS, 2)[:, 0]
    early = (np.arange(STEPS) % 60 < 16)[:, None]
    ids = np.where(early, experts_of(tokens), random)
    result = token_identity(traced(ids, tokens))
    assert result.column("early")[0] == pytest.approx(1)
    assert result.summary["late_minus_early"] < -0.9


def test_tokens_are_needed():
    ids = random_ids(20, 4, 2)
    with pytest.raises(UserError, match="no token ids"):
        token_identity(make_trace(ids, 4, tokens=np.full(20, -1)))
    with pytest.raises(UserError, match="none of the 20 tokens read occurs twice"):
        token_identity(make_trace(ids, 4))
