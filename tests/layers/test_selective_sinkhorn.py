"""SSR: the checks of its method section."""

import pytest
import torch

from moekit.core.errors import UserError
from moekit.layers import RouterContext, build_router
from moekit.ops.sinkhorn import sinkhorn

D, E, K, T = 16, 4, 2, 32


def hidden() -> torch.Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(3))


def router(**options):
    made = build_router("ssr", D, E, K, **options)
    torch.nn.init.normal_(made.score.linear.weight, generator=torch.Generator().manual_seed(0))
    return made


@pytest.mark.parametrize(("training", "probability"), [(True, 0.0), (False, 1.0)])
def test_without_transport_steps_it_is_plain_top_k_bit_for_bit(training, probability):
    made = router(probability=probability)
    plain = build_router("softmax-renormalised", D, E, K)
    plain.score.weight = made.score.linear.weight
    context = RouterContext(1, T, training=training)
    ours, theirs = made(hidden(), context), plain(hidden(), context)
    assert torch.equal(ours.expert, theirs.expert)
    assert torch.equal(ours.weight, theirs.weight)


@pytest.mark.parametrize("transported", ["softmax", "logits"])
def test_a_transport_step_routes_by_the_plan_and_leaves_padding_out(transported):
    made = router(probability=1.0, transported=transported)
    mask = torch.arange(T) < 24
    routing = made(hidden(), RouterContext(1, T, training=True, token_mask=mask))
    own = made.score.linear(hidden(), RouterContext(1, T))[mask]
    own = own.softmax(-1) if transported == "softmax" else own
    plan = sinkhorn(own, 0.5, iterations=1000, tolerance=1e-7).plan
    # The router stops at a relative error of 1e-5 of the columns.
    torch.testing.assert_close(routing.scores[mask], plan, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        routing.scores[mask].sum(0), torch.full((E,), 24 / E), rtol=2e-5, atol=0
    )
    ids, weights = routing.topk()
    assert torch.equal(ids[mask].sort(1).values, plan.topk(K).indices.sort(1).values)
    torch.testing.assert_close(weights.sum(1), torch.ones(T))


@pytest.mark.parametrize("differentiable", [False, True])
def test_a_transport_step_trains_the_router_only_if_asked(differentiable):
    made = router(probability=1.0, differentiable=differentiable)
    routing = made(hidden(), RouterContext(1, T, training=True))
    (routing.weight * torch.arange(T * K)).sum().backward()
    assert bool(made.score.linear.weight.grad.any()) == differentiable


def test_the_branch_and_the_noise_repeat_for_a_step_and_differ_between_steps():
    made = router(probability=0.5, noise=0.1)
    taken = []
    for step in range(40):
        contexts = [RouterContext(1, T, training=True, step=step) for _ in range(2)]
        first, second = (made(hidden(), context) for context in contexts)
        assert torch.equal(first.weight, second.weight)
        taken.append(bool((first.scores.sum(0) * E / T - 1).abs().max() < 1e-3))
    # Forty draws of probability one half, of a fixed seed.
    assert 10 < sum(taken) < 30


def test_a_transport_step_of_a_collapsed_router_is_more_even():
    """What a transport step is for; whether a few of them balance a training run is in the log."""

    def imbalance(probability: float, **options) -> float:
        made = router(probability=probability, **options)
        with torch.no_grad():
            made.score.linear.weight.mul_(0.3)
            made.score.linear.weight[0, 0] += 3.0
        x = hidden()
        x[:, 0] = 2.0
        load = made(x, RouterContext(1, T, training=True)).counts()
        return float(load.max() / load.mean() - 1)

    # Every token has the first expert among its two: twice the fair share.
    assert imbalance(0.0) == 1.0
    assert imbalance(1.0) < 0.5
    assert imbalance(1.0, transported="logits", smoothing=0.05) < 0.5


def test_bad_options_are_told():
    with pytest.raises(UserError, match="probability 2"):
        router(probability=2)
    with pytest.raises(UserError, match="did you mean 'logits'"):
        router(transported="logit")
