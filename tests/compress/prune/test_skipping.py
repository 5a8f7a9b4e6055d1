"""Skipping at run time: limits of the thresholds, what runs, what is protected."""

from __future__ import annotations

import pytest
import torch

from moekit.compress.prune.skipping import (
    ImportantTokens,
    WeightRatio,
    quietest,
    skipping,
    skipping_errors,
    thresholds,
)
from moekit.core.errors import UserError
from moekit.core.registry import registry
from moekit.core.routing_rule import Routing
from moekit.profile.attention import attention_received
from tests.compress.prune.common import made_stats, tiny_stats, tiny_view, tokens
from tests.profile.common import padded_batch


@pytest.fixture(scope="module")
def view():
    return tiny_view()


@pytest.fixture(scope="module")
def stats(view):
    return tiny_stats(view)


def logits(view, batch=None) -> torch.Tensor:
    batch = batch or tokens()
    with torch.no_grad():
        return view.model(input_ids=batch.ids, attention_mask=batch.mask).logits


@pytest.mark.parametrize("method", ["odp", "naee-skipping"])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_a_quantile_of_zero_changes_no_bit(method, family):
    # Checks (c) of NAEE and MC-MoE.
    view = tiny_view(family)
    stats = tiny_stats(view)
    expected = logits(view)
    start = registry.find(method, kind="skipping").load()
    with start(view, stats, quantile=0.0, importance="norm") as skipped:
        assert torch.equal(logits(view), expected)
    assert skipped.share == 0
    assert skipped.chosen > 0


def test_a_threshold_above_one_leaves_the_first(view):
    # Check (c) of NAEE: top-1, with the whole weight of the token where the family normalises.
    calls = []
    rule = WeightRatio(dict.fromkeys(range(len(view)), 1.5))
    with skipping(view, rule) as skipped, view.observe(calls.append):
        logits(view)
    assert skipped.share == 0.5
    for call in calls:
        used = call.ids >= 0
        assert bool((used.sum(-1) == 1).all())
        torch.testing.assert_close(call.weights.sum(-1), torch.ones(len(call.ids)))


def test_weights_stay_where_the_family_does_not_normalise():
    view = tiny_view("qwen3_moe", norm_topk_prob=False)
    plain, skipped = [], []
    with view.observe(plain.append, layers=[0]):
        logits(view)
    with skipping(view, WeightRatio({0: 1.5}), [0]), view.observe(skipped.append, layers=[0]):
        logits(view)
    first = plain[0].weights.max(-1).values
    assert torch.equal(skipped[0].weights.max(-1).values, first)


def test_thresholds_are_quantiles_of_the_ratio(view, stats):
    ratios = [[], []]

    def see(call):
        first, second = call.weights.topk(2, dim=-1).values.unbind(-1)
        ratios[call.layer.position].append(second / first)

    with view.observe(see):
        logits(view)
    for quantile in (0.25, 0.5, 0.9):
        found = thresholds(stats, quantile)
        for position, seen in enumerate(ratios):
            below = (torch.cat(seen) < found[position]).double().mean()
            # The histogram has 256 bins, and a bin holds a few of the 96 tokens.
            assert abs(float(below) - quantile) < 0.05
    with skipping(view, WeightRatio(thresholds(stats, 0.5))) as skipped:
        logits(view)
    # Half of the second choices: inputs of the second layer have moved a little.
    assert abs(skipped.share - 0.25) < 0.05


def test_only_the_layers_asked_for(view):
    calls = []
    rule = WeightRatio(dict.fromkeys(range(2), 1.5))
    with skipping(view, rule, [1]), view.observe(calls.append):
        logits(view)
    assert [bool((call.ids < 0).any()) for call in calls] == [False, True]


def test_important_tokens_keep_their_choices(view, stats):
    calls = []
    important = ImportantTokens(view, 0.1, "attention")
    rule = WeightRatio(dict.fromkeys(range(2), 1.5), important)
    batch = padded_batch(20)
    with important.watched(), skipping(view, rule), view.observe(calls.append):
        logits(view, batch)
    for call in calls:
        full = (call.ids >= 0).all(-1).view(batch.ids.shape)
        assert full.sum(1).tolist() == [2, 2, 2]
        assert not bool(full[batch.mask == 0].any())


def test_importance_by_hand(view):
    batch, calls = padded_batch(12), []
    important = ImportantTokens(view, 0.1, "attention")
    rule = WeightRatio({0: 1.5, 1: 1.5}, important)
    with important.watched():
        with torch.no_grad():
            out = view.model(input_ids=batch.ids, attention_mask=batch.mask, output_attentions=True)
        with skipping(view, rule, [0]), view.observe(calls.append, layers=[0]):
            logits(view, batch)
    weights = out.attentions[view[0].index]
    score = torch.zeros(batch.ids.shape)
    hidden = calls[0].hidden.view(*batch.ids.shape, -1)
    for b in range(3):
        length = int(batch.mask[b].sum())
        for j in range(length):
            received = sum(float(weights[b, :, i, j].sum()) for i in range(j, length))
            score[b, j] = float(hidden[b, j].abs().sum()) * received / (length - j)
    full = (calls[0].ids >= 0).all(-1).view(batch.ids.shape)
    assert torch.equal(full.float().argmax(1), score.argmax(1))


def test_the_first_token_of_uniform_attention_receives_most():
    # Check (c) of MC-MoE.
    causal = torch.ones(6, 6).tril()
    weights = (causal / causal.sum(1, keepdim=True)).expand(2, 3, 6, 6)
    received = attention_received(weights)
    assert received.argmax(1).tolist() == [0, 0]
    # 3 heads times the mean of 1, 1/2, ..., 1/6.
    assert received[0, 0] == pytest.approx(3 * sum(1 / i for i in range(1, 7)) / 6)
    # The cache's tokens are no queries of this forward.
    cached = torch.cat([torch.zeros(2, 3, 6, 4), weights], -1)
    assert torch.equal(attention_received(cached), received)


def test_decoding_steps_protect_nothing(view):
    important = ImportantTokens(view, 0.5, "norm")
    seen = []

    def look(layer, routing, hidden):
        seen.append((len(hidden), int(important.of(layer, hidden).sum())))
        return routing

    with view.transform_routing(look, on="selection", layers=[0]):
        view.model.generate(tokens().ids[:1, :4], max_new_tokens=3, do_sample=False)
    assert seen == [(4, 2), (1, 0), (1, 0)]


def test_errors_of_layers(view, stats):
    batches = [tokens()]
    nothing = skipping_errors(view, batches, WeightRatio({}))
    assert nothing == [0, 0]
    everything, half = (
        skipping_errors(view, batches, WeightRatio(beta))
        for beta in ({0: 1.5, 1: 1.5}, thresholds(stats, 0.5))
    )
    assert all(0 < h < e for h, e in zip(half, everything, strict=True))
    assert quietest([0.3, 0.1, 0.2], 2) == [1, 2]


def test_skipped_choices_are_not_computed(view):
    # A skipped expert that would make NaN does not run.
    view = tiny_view()
    expert = view[0].get_expert(0)
    expert.down.fill_(float("nan"))
    view[0].set_expert(0, expert)

    class Others:
        def keep(self, layer, routing: Routing, hidden) -> torch.Tensor:
            return routing.ids != 0

    with skipping(view, Others(), [0]):
        assert bool(logits(view).isfinite().all())


def test_refusals(view, stats):
    with pytest.raises(UserError, match=r"quantile 1\.5"):
        thresholds(stats, 1.5)
    with pytest.raises(UserError, match="weight_ratio"):
        thresholds(made_stats([[1, 1]]))
    important = ImportantTokens(view, 0.1, "attention")
    # Nobody watches the attention here.
    with skipping(view, WeightRatio({}, important)), pytest.raises(UserError, match="no weights"):
        logits(view)
