"""Ablations with known effects, and effects that must not be seen."""

import numpy as np
import pytest
import torch

from moekit.analyze.causal_importance import causal_importance, sample_losses
from moekit.analyze.paired import clustered_mean, student_quantile
from moekit.core.errors import UserError

from .models import tiny_view, traced


@pytest.fixture(scope="module")
def view():
    return tiny_view(num_experts=4)


def units(result, layers=False):
    return {
        (u["layer"], u["expert"]): u["change"]
        for u in result.detail["units"]
        if layers or u["expert"] is not None
    }


def test_an_expert_that_adds_nothing_is_worth_exactly_nothing():
    """Expert 1 of layer 0 puts out zeros: leaving it out changes no bit of the loss."""
    view = tiny_view(num_experts=4)
    with torch.no_grad():
        view[0].expert_views(1).down.zero_()
    found = units(causal_importance(traced(view), view, what="experts", ablation="skip"))
    assert found.pop((0, 1)) == [0, 0, 0]
    assert all(change[0] != 0 for change in found.values())


def test_the_planted_expert_matters_most_and_in_its_domain():
    """Only what expert 1 of the last layer adds lets the model predict the domain's one token."""
    view = tiny_view(num_experts=4, num_hidden_layers=1, num_experts_per_tok=1)
    target, layer = 7, view[0]
    with torch.no_grad():
        view.model.model.layers[0].self_attn.o_proj.weight.zero_()
        layer.experts.down_proj.zero_()
        direction = torch.zeros(32)
        direction[0] = 1.0
        # Every expert but the planted one writes nothing; it writes what the head reads as 7.
        layer.expert_views(1).down.copy_(direction[:, None].expand(32, 16))
        layer.expert_views(1).up.copy_(layer.expert_views(1).gate)
        view.model.lm_head.weight.mul_(0.1)
        view.model.lm_head.weight[:, 0] = 0
        view.model.lm_head.weight[target, 0] = 8.0
    tokens = [t for t in range(320) if t != target]
    chosen = {0: [], 1: []}
    for t in tokens:
        calls = []
        with torch.no_grad(), view.observe(calls.append):
            view.model(torch.tensor([[t]]))
        chosen[int(calls[0].ids[0, 0] == 1)].append(t)
    planted = [[x for t in chosen[1][i : i + 8] for x in (t, target)] for i in range(0, 40, 8)]
    plain = [chosen[0][i : i + 16] for i in range(0, 80, 16)]
    trace = traced(view, samples=[(s, "planted") for s in planted] + [(s, "plain") for s in plain])
    result = causal_importance(trace, view, what="experts", ablation="skip")
    first = result.rows[0]
    assert first[:2] == (0, "expert 1")
    assert first[3] > 0
    assert first[5] == "planted"
    by_domain = {u["expert"]: u["by_domain"] for u in result.detail["units"]}
    assert by_domain[1]["planted"][1] > 0
    # None of the plain texts' tokens reaches the expert.
    assert by_domain[1]["plain"] == [0, 0, 0]


def test_a_copy_in_its_place_loses_nothing(view):
    """All experts of the layer are equal: whichever the router picks, nothing changes."""
    same = tiny_view(num_experts=4, norm_topk_prob=True)
    for e in range(1, 4):
        same[1].set_expert(e, same[1].get_expert(0))
    trace = traced(same)
    found = units(causal_importance(trace, same), layers=True)
    for (layer, _), (mean, low, high) in found.items():
        if layer == 1:
            # Equal experts with weights that add up to one, summed in another order.
            assert abs(mean) < 1e-5
            assert low <= 1e-5
            assert high >= -1e-5
    assert abs(found[0, None][0]) > 1e-3


def test_skipping_by_hand(view):
    trace = traced(view)
    found = units(causal_importance(trace, view, what="experts", ablation="skip"))
    samples = [(trace.tokens[s.start : s.stop].tolist(), s.domain) for s in trace.samples]
    base = sample_losses(view, samples)
    weights = view[2].expert_views(3).down
    kept = weights.clone()
    with torch.no_grad():
        weights.zero_()
        without = sample_losses(view, samples)
        weights.copy_(kept)
    expected = (without - base).sum() / sum(len(ids) - 1 for ids, _ in samples)
    # An output of zeros and no output at all, summed in another order.
    assert found[2, 3][0] == pytest.approx(expected, abs=1e-5)


def test_the_budget_decides_how_many_and_progress_counts(view):
    trace, seen = traced(view), []
    tokens = 94
    result = causal_importance(
        trace, view, budget=6 * tokens, progress=lambda *done: seen.append(done)
    )
    assert result.summary["ablations"] == 6
    assert result.summary["left_out"] == 9
    assert "9 experts were not ablated" in result.notes[0]
    assert seen == [(i, 6) for i in range(6)]
    used = {(p, e): int((trace.layer(p).topk_ids == e).sum()) for p in range(3) for e in range(4)}
    assert set(units(result)) == set(sorted(used, key=lambda k: -used[k])[:3])
    random = [
        set(units(causal_importance(trace, view, budget=6 * tokens, choose="random", seed=s)))
        for s in (0, 0, 1)
    ]
    assert random[0] == random[1] != random[2]


def test_random_directions_do_not_fire():
    """Differences around zero: the interval excludes 0 about as often as it may."""
    rng = np.random.default_rng(0)
    counts = rng.integers(5, 60, 12).astype(float)
    fired = sum(
        clustered_mean(np.array([rng.normal(size=int(n)).sum() for n in counts]), counts).differs
        for _ in range(400)
    )
    # 5 % expected; four standard deviations of a binomial above it.
    assert fired < 20 + 4 * 4.4


def test_tokens_of_one_text_are_not_independent():
    """Each text shifts all its tokens: a count of tokens would call this certain."""
    rng = np.random.default_rng(1)
    counts = np.full(6, 500.0)
    fired = sum(clustered_mean(rng.normal(size=6) * counts, counts).differs for _ in range(300))
    assert fired < 15 + 4 * 3.8
    assert not clustered_mean(np.array([3.0]), np.array([3.0])).differs


def test_student_quantiles():
    known = {1: 12.706, 2: 4.303, 3: 3.182, 5: 2.571, 10: 2.228, 30: 2.042}
    for freedom, value in known.items():
        assert student_quantile(0.975, freedom) == pytest.approx(value, rel=1e-2)


def test_unknown_settings_are_refused(view):
    trace = traced(view)
    for option in ("what", "ablation", "choose"):
        with pytest.raises(UserError, match=f"{option} is 'x'; it is one of"):
            causal_importance(trace, view, **{option: "x"})
    with pytest.raises(UserError, match="two tokens"):
        causal_importance(traced(view, lengths=(1, 1)), view)
