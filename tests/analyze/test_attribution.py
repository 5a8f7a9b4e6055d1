"""Experts that go with marker tokens, and with a labelled behaviour."""

import numpy as np
import pytest

from moekit.analyze.behaviour_audit import behaviour_audit
from moekit.analyze.cognitive_experts import cognitive_experts
from moekit.core.errors import UserError

from .traces import make_trace, random_ids

MARKER = 7


def marked(planted, steps=4000, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 100, steps)
    ids = random_ids(steps, 8, 1, layers=2, seed=seed)
    if planted:
        ids[:, 1] = np.where(ids[:, 1] == 3, 4, ids[:, 1])
        ids[tokens == MARKER, 1] = 3
    return make_trace(ids, 8, tokens=tokens)


def test_an_expert_that_fires_on_the_marker_only_and_always():
    result = cognitive_experts(marked(planted=True), markers=[MARKER])
    assert result.rows[0] == (1, 3, pytest.approx(1))
    assert result.rows[1][2] < 0.2
    assert result.summary["p_random"] <= 1 / 50
    assert result.summary["p_control"] <= 1 / 50


def test_independent_experts_are_not_cognitive():
    p = [cognitive_experts(marked(False, seed=s), markers=[MARKER]).summary for s in range(10)]
    # 10 tests at 5 %: more than 3 has probability 0.1 %.
    assert sum(row["p_random"] <= 0.05 for row in p) <= 3
    assert sum(row["p_control"] <= 0.05 for row in p) <= 3


def test_a_router_by_token_identity_is_seen_by_the_controls():
    """Every token has experts of its own: the marker is nothing special."""
    tokens = np.random.default_rng(0).integers(0, 100, 4000)
    table = random_ids(100, 64, 1)[:, 0]
    result = cognitive_experts(make_trace(table[tokens], 64, tokens=tokens), markers=[MARKER])
    assert result.summary["p_random"] <= 1 / 50
    assert result.summary["p_control"] > 0.1


def test_several_markers_are_averaged():
    one = cognitive_experts(marked(True), markers=[MARKER]).detail["npmi"][1]
    other = cognitive_experts(marked(True), markers=[8]).detail["npmi"][1]
    both = cognitive_experts(marked(True), markers=[MARKER, 8]).detail["npmi"][1]
    np.testing.assert_allclose(both, (one + other) / 2)


def test_markers_that_do_not_occur_are_refused():
    with pytest.raises(UserError, match=r"markers \[500\] do not occur in the trace's 4000 tokens"):
        cognitive_experts(marked(False), markers=[MARKER, 500])


def prompts(planted, seed=0, samples=24, length=20):
    """Prompts of two labels; with `planted`, expert 5 of layer 1 serves the first one."""
    steps = samples * length
    label = np.repeat(np.arange(samples) % 2 == 0, length)
    bias = np.zeros((steps, 2, 8))
    bias[label, 1, 5] = planted
    # Prompts differ among themselves, whatever their label.
    taste = np.random.default_rng(seed).normal(size=(samples, 1, 2, 8))
    bias += np.broadcast_to(taste, (samples, length, 2, 8)).reshape(steps, 2, 8)
    names = ["refuses" if i % 2 == 0 else "answers" for i in range(samples)]
    ids = random_ids(steps, 8, 2, 2, seed, bias)
    return make_trace(ids, 8, lengths=[length] * samples, domains=names)


def test_a_planted_expert_is_found():
    result = behaviour_audit(prompts(5.0), positive="refuses", negative="answers")
    assert result.rows[0][:2] == (1, 5)
    assert result.rows[0][3] <= 0.01
    assert result.rows[1][3] > 0.05
    assert result.summary["p"] <= 0.05
    assert result.summary["top_5_percent"] > 0.4
    assert result.summary["participation"] < result.summary["participation_by_chance"]


def test_labels_without_meaning_find_nothing():
    names = {"positive": "refuses", "negative": "answers"}
    found = [behaviour_audit(prompts(0.0, seed), **names) for seed in range(10)]
    # 10 tests at 5 %: more than 3 has probability 0.1 %.
    assert sum(result.summary["p"] <= 0.05 for result in found) <= 3
    assert sum(result.summary["significant_experts"] > 0 for result in found) <= 3


def test_the_same_prompts_under_both_labels_differ_in_nothing():
    ids = np.tile(random_ids(200, 8, 2), (2, 1, 1))
    trace = make_trace(ids, 8, lengths=[50] * 8, domains=["a"] * 4 + ["b"] * 4)
    result = behaviour_audit(trace, positive="a", negative="b")
    assert not result.detail["difference"].any()
    assert result.summary["p"] == 1
