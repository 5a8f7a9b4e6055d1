"""Every score against its formula on single tokens, and the properties the papers give."""

from __future__ import annotations

import pytest
import torch

from moekit.compress.prune.saliency import saliency, score
from moekit.core.errors import UserError
from moekit.core.registry import registry
from moekit.ops.experts_naive import run_expert
from moekit.profile import profile
from moekit.profile.routing_sums import token_contributions
from tests.compress.prune.common import made_stats, tiny_stats, tiny_view, tokens

# float32 sums of a few dozen terms, taken in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-6}
METHODS = [method.name for method in registry.methods(kind="saliency")]


@pytest.fixture(scope="module")
def view():
    return tiny_view()


@pytest.fixture(scope="module")
def stats(view):
    return tiny_stats(view)


@pytest.fixture(scope="module")
def pairs(view):
    """(layer, expert, gate, norm, contribution) of every token and choice, one by one."""
    found, streams = [], {}
    hooks = [
        block.post_attention_layernorm.register_forward_hook(
            lambda _, args, __, i=i: streams.__setitem__(i, args[0].flatten(0, 1))
        )
        for i, block in enumerate(view.model.model.layers)
    ]

    def see(call):
        for t in range(len(call.hidden)):
            outputs = [
                run_expert(call.layer.experts, e, call.hidden[t : t + 1])
                for e in call.ids[t].tolist()
            ]
            update = sum(w * o for w, o in zip(call.weights[t], outputs, strict=True))
            turned = token_contributions(streams[call.layer.index][t : t + 1], update)
            found.extend(
                (call.layer.position, e, float(gate), float(output.norm()), float(turned))
                for e, gate, output in zip(
                    call.ids[t].tolist(), call.weights[t], outputs, strict=True
                )
            )

    with view.observe(see), torch.no_grad():
        view.model(input_ids=tokens().ids)
    for hook in hooks:
        hook.remove()
    return found


FORMULAS = {
    "frequency": (0, 0, 0, "sum"),
    "gate-mass": (1, 0, 0, "sum"),
    "dern": (1, 0, 0, "all"),
    "ean": (0, 1, 0, "sum"),
    "gated-ean": (1, 1, 0, "sum"),
    "reap": (1, 1, 0, "routed"),
    "man": (0, 1, 0, "routed"),
    "msan": (0, 2, 0, "routed"),
    "easy-ep": (1, 1, 1, "sum"),
}


@pytest.mark.parametrize("method", FORMULAS)
def test_score_is_its_formula(method, stats, view, pairs):
    p, q, s, aggregate = FORMULAS[method]
    for position, found in enumerate(score(stats, method)):
        expected = torch.zeros(view[position].num_experts, dtype=torch.float64)
        count = torch.zeros_like(expected)
        for _, e, gate, norm, turned in (row for row in pairs if row[0] == position):
            expected[e] += gate**p * norm**q * turned**s
            count[e] += 1
        if aggregate == "routed":
            expected /= count.clamp(min=1)
        elif aggregate == "all":
            expected /= tokens().ids.numel()
        torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_scores_every_expert(method, stats):
    for layer, found in zip(stats.layers, score(stats, method), strict=True):
        assert found.shape == (layer.num_experts,)
        assert found.dtype == torch.float64
        assert bool(found.isfinite().all())


def test_reap_scales_with_the_down_projection():
    # Check (a) of REAP. Only the layer itself: what follows sees other inputs.
    view = tiny_view()
    before = score(tiny_stats(view), "reap")[0]
    expert = view[0].get_expert(1)
    expert.down = expert.down * 4
    view[0].set_expert(1, expert)
    after = score(tiny_stats(view), "reap")[0]
    factor = torch.ones_like(before)
    factor[1] = 4
    assert before[1] > 0
    # A power of two scales floating-point numbers exactly.
    assert torch.equal(after, before * factor)


def test_equal_tokens_but_different_counts():
    # Check (b) of REAP: a conditional mean does not see how often, a sum does.
    stats = made_stats([[6, 2, 1, 3]])
    assert score(stats, "reap")[0].unique().numel() == 1
    assert score(stats, "ean")[0].tolist() == [12, 4, 2, 6]


def test_a_silent_expert_goes_first():
    # Check (d) of REAP.
    view = tiny_view()
    expert = view[0].get_expert(2)
    expert.down = torch.zeros_like(expert.down)
    view[0].set_expert(2, expert)
    stats = tiny_stats(view)
    for method in ("reap", "man", "msan", "ean", "easy-ep", "max-activation"):
        found = score(stats, method)[0]
        assert found[2] == 0
        assert int(found.argmin()) == 2


def test_an_expert_without_tokens_goes_first(stats):
    for method in ("frequency", "gate-mass", "reap", "man", "msan"):
        assert score(made_stats([[4, 0, 2, 2]]), method)[0].argmin() == 1


def test_tokens_that_are_not_turned_do_not_count():
    # Check (a) of EASY-EP: an update of zero, or along the stream, contributes nothing.
    view = tiny_view()
    for e in range(view[0].num_experts):
        expert = view[0].get_expert(e)
        expert.down = torch.zeros_like(expert.down)
        view[0].set_expert(e, expert)
    assert float(score(tiny_stats(view), "easy-ep")[0].abs().max()) == 0
    stream = torch.randn(5, 8)
    # The rest of rounding: the part across is cancelled to about 1e-7 of it, and squared.
    assert float(token_contributions(stream, 2 * stream).max()) < 1e-12


def test_easy_ep_with_equal_turns_is_gated_ean(stats):
    # Check (b) of EASY-EP: with a token weight of 1 the score is the gated sum of norms.
    with_turns = saliency(stats, gate=1, norm=1)
    for found, expected in zip(score(stats, "gated-ean"), with_turns, strict=True):
        assert torch.equal(found, expected)


def test_tcess_ranks_unused_experts_last(view, stats):
    for top1, name in ((False, "kept_logit_sum"), (True, "top_logit_sum")):
        for position, found in enumerate(score(stats, "tcess", top1=top1)):
            total = stats.by_domain(position, name)
            used = total != 0
            mean = total / stats.num_tokens(position)
            torch.testing.assert_close(found[used], mean[used])
            if bool((~used).any()):
                assert float(found[~used].max()) < float(found[used].min())


def test_tcess_of_all_logits_is_their_mean():
    # Check (4) of PreMoe: with every expert chosen and nothing left out it is the mean logit.
    view = tiny_view("qwen3_moe", num_experts_per_tok=8, num_experts=8)
    stats = tiny_stats(view)
    for position, found in enumerate(score(stats, "tcess")):
        mean = stats.by_domain(position, "logit_sum") / stats.num_tokens(position)
        torch.testing.assert_close(found, mean)


def test_domains(stats, view):
    both = score(stats, "ean")
    parts = [score(stats, "ean", domain=name) for name in ("a", "b")]
    for whole, a, b in zip(both, *parts, strict=True):
        torch.testing.assert_close(whole, a + b)
    mixed = score(stats, "ean", by_domain=True)
    for found, a, b in zip(mixed, *parts, strict=True):
        torch.testing.assert_close(found, a / a.sum() + b / b.sum())
    only_a = profile(view, [tokens().ids[::2]])
    for found, expected in zip(parts[0], score(only_a, "ean"), strict=True):
        torch.testing.assert_close(found, expected, **CLOSE)


def test_random_depends_on_the_seed_alone(stats):
    first, again, other = (score(stats, "random", seed=s) for s in (1, 1, 2))
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0], first[1])


def test_refusals(stats):
    with pytest.raises(UserError, match="did you mean reap"):
        score(stats, "reep")
    with pytest.raises(UserError, match="no domain 'c'; the stats have a, b"):
        score(stats, "reap", domain="c")
    with pytest.raises(UserError, match="not kept by domain"):
        score(stats, "max-activation", domain="a")
    with pytest.raises(UserError, match="exponents"):
        saliency(stats, gate=3)
