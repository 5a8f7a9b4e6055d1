"""Measures of training: congestion, its phases, and when routing settles."""

import numpy as np
import pytest

from moekit.analyze.congestion import congestion, equilibrium, fit_congestion
from moekit.analyze.routing_drift import routing_drift
from moekit.analyze.training_phases import find_phases, training_phases
from moekit.core.errors import UserError

from .traces import make_trace, random_ids

WORTH = np.array([1.5, 0.5, 0.0, -0.5, -1.0, 0.2])


def loaded_trace(gamma, steps=6000, step=None, seed=0, worth=WORTH):
    """Top-1 routing with the loads of a gamma; the gates tell the experts' worth."""
    load = equilibrium(worth, np.array([gamma]))[0]
    ids = np.random.default_rng(seed).choice(len(worth), steps, p=load)[:, None, None]
    return make_trace(ids, len(worth), weights=np.exp(worth)[ids], step=step)


def test_equilibrium_at_its_ends():
    free = np.exp(WORTH) / np.exp(WORTH).sum()
    loads = equilibrium(WORTH, np.array([0.0, 1e4]))
    np.testing.assert_allclose(loads[0], free, atol=1e-8)
    np.testing.assert_allclose(loads[1], 1 / 6, atol=1e-3)
    for gamma in (3.0, 40.0):
        load = equilibrium(WORTH, np.array([gamma]))[0]
        again = np.exp(WORTH - gamma * load)
        np.testing.assert_allclose(load, again / again.sum(), atol=1e-7)


@pytest.mark.parametrize("gamma", [0.0, 2.0, 14.0, 38.0])
def test_known_gamma_is_recovered(gamma):
    found, error, _ = fit_congestion(equilibrium(WORTH, np.array([gamma]))[0], WORTH)
    assert found == pytest.approx(gamma, abs=0.05)
    assert error < 1e-3
    # From 6000 sampled tokens: loads are known to about 3 %.
    result = congestion(loaded_trace(gamma))
    assert result.summary["gamma"] == pytest.approx(gamma, rel=0.25, abs=0.3)
    assert result.summary["quality"] == "gate"


def test_logits_are_used_where_there_are_some():
    load = equilibrium(WORTH, np.array([5.0]))[0]
    ids = np.random.default_rng(0).choice(6, 6000, p=load)[:, None, None]
    logits = np.tile(WORTH, (6000, 1, 1))
    result = congestion(make_trace(ids, 6, logits=logits))
    assert result.summary["gamma"] == pytest.approx(5, rel=0.25)
    assert result.summary["quality"] == "logit"


def test_equal_experts_say_nothing_about_gamma():
    result = congestion(loaded_trace(7.0, worth=np.zeros(6)))
    assert np.isnan(result.summary["gamma"])


def test_gamma_needs_what_it_is_asked_for():
    with pytest.raises(UserError, match="record with --logits"):
        congestion(loaded_trace(1.0), quality="logit")
    with pytest.raises(UserError, match="not 'norm'"):
        congestion(loaded_trace(1.0), quality="norm")


COURSE = [8, 14, 25, 34, 38, 39, 38, 37, 33, 25, 16, 10]


def test_three_phases_are_found():
    # A large gamma evens the loads out, so that telling it needs many tokens.
    traces = [loaded_trace(g, 100_000, step=100 * i, seed=i) for i, g in enumerate(COURSE)]
    result = training_phases(traces)
    assert result.column("step") == [100 * i for i in range(12)]
    np.testing.assert_allclose(result.column("gamma"), COURSE, rtol=0.3)
    found = result.summary
    assert found["three_phases"]
    assert 200 <= found["plateau_from"] <= 500
    assert 600 <= found["plateau_to"] <= 900


@pytest.mark.parametrize("seed", range(20))
def test_a_flat_course_has_no_phases(seed):
    noise = np.random.default_rng(seed).normal(0, 1.5, 25)
    found = find_phases(np.arange(25.0), 20 + noise)
    assert not found["three_phases"]


def test_a_rise_alone_is_no_three_phases():
    found = find_phases(np.arange(12.0), np.linspace(5, 40, 12))
    assert found["surge"]
    assert not found["relaxation"]
    assert not found["three_phases"]


def test_drift_of_routing():
    """Random until step 2, as at the end from then on."""
    last = random_ids(800, 8, 2, layers=2, seed=9)
    steps = [random_ids(800, 8, 2, layers=2, seed=i) for i in range(2)] + [last] * 3
    result = routing_drift([make_trace(ids, 8, step=i) for i, ids in enumerate(steps)])
    agreement = result.column("agreement")
    np.testing.assert_allclose(agreement[:2], 0, atol=0.06)
    assert agreement[2:] == pytest.approx([1, 1, 1])
    assert result.summary["settled"] == 2
    assert result.column("previous")[3:] == pytest.approx([1, 1])


def test_what_is_no_training_run_is_refused():
    flat = [loaded_trace(1.0, steps=50) for _ in range(6)]
    with pytest.raises(UserError, match="metadata has no step"):
        training_phases(flat)
    with pytest.raises(UserError, match="5 steps or more"):
        training_phases([loaded_trace(1.0, steps=50, step=i) for i in range(4)])
    with pytest.raises(UserError, match="not ascending"):
        training_phases([loaded_trace(1.0, steps=50, step=0) for _ in range(6)])
    with pytest.raises(UserError, match="step 0 is of other text"):
        routing_drift([loaded_trace(1.0, steps=50 + i, step=i) for i in range(2)])
