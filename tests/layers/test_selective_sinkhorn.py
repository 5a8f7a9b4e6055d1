"""SSR: the checks of its method section."""

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from moekit.core.errors import UserError
from moekit.layers import RouterContext, build_router
from moekit.layers.routers.selective_sinkhorn import transport_dual

D, E, K, T = 16, 4, 2, 32


def scores(seed: int = 0) -> torch.Tensor:
    skew = torch.linspace(1, 0, E)
    return torch.randn(T, E, generator=torch.Generator().manual_seed(seed)) + 2 * skew


def hidden() -> torch.Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(3))


def router(**options):
    made = build_router("ssr", D, E, K, **options)
    torch.nn.init.normal_(
        made.score.linear.weight, generator=torch.Generator().manual_seed(0)
    )
    return made


def plan(values: torch.Tensor, smoothing: float, **limits) -> torch.Tensor:
    return (values / smoothing + transport_dual(values, smoothing, **limits)).softmax(-1)


def test_rows_and_columns_of_the_plan():
    result = plan(scores(), 0.5, tolerance=1e-5)
    torch.testing.assert_close(result.sum(1), torch.ones(T))
    # The stated tolerance of the iteration, relative to T / E.
    assert (result.sum(0) * E / T - 1).abs().max() <= 2e-5


def test_a_large_smoothing_is_uniform_and_a_small_one_the_best_balanced_assignment():
    assert torch.allclose(plan(scores(), 1e4), torch.full((T, E), 1 / E), atol=1e-3)
    values = scores()
    sharp = plan(values, 0.02, max_iterations=3000)
    rows, columns = linear_sum_assignment(-values.repeat_interleave(T // E, 1).numpy())
    assert (sharp.argmax(1) == torch.as_tensor(columns // (T // E))).all()
    assert (torch.bincount(sharp.argmax(1), minlength=E) == T // E).all()


def test_the_row_form_agrees_with_plain_sinkhorn_iterations():
    kernel = (scores().double() / 0.5).exp()
    rows, columns = torch.ones(T, 1).double(), torch.ones(E).double()
    for _ in range(500):
        columns = T / E / (kernel * rows).sum(0)
        rows = 1 / (kernel * columns).sum(1, keepdim=True)
    # Double against single precision.
    torch.testing.assert_close(
        plan(scores(), 0.5), (rows * kernel * columns).float(), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("training, probability", [(True, 0.0), (False, 1.0)])
def test_without_transport_steps_it_is_plain_top_k_bit_for_bit(training, probability):
    made = router(probability=probability)
    plain = build_router("softmax-renormalised", D, E, K)
    plain.score.weight = made.score.linear.weight
    context = RouterContext(1, T, training=training)
    ours, theirs = made(hidden(), context), plain(hidden(), context)
    assert torch.equal(ours.expert, theirs.expert)
    assert torch.equal(ours.weight, theirs.weight)


def test_a_transport_step_routes_by_the_plan_and_leaves_padding_out():
    made = router(probability=1.0)
    mask = torch.arange(T) < 24
    context = RouterContext(1, T, training=True, token_mask=mask)
    routing = made(hidden(), context)
    own = made.score.linear(hidden(), context).softmax(-1)
    expected = plan(own[mask], 0.5)
    torch.testing.assert_close(routing.scores[mask], expected, rtol=1e-4, atol=1e-6)
    _, weights = routing.topk()
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
        column = first.scores.sum(0)
        taken.append(bool((column * E / T - 1).abs().max() < 1e-3))
    # Forty draws of probability one half, of a fixed seed.
    assert 10 < sum(taken) < 30


def test_a_collapsing_router_stays_more_even_with_transport_steps():
    """Experts that are used get better, so a router without balance uses few of them."""

    def imbalance(probability: float) -> float:
        torch.manual_seed(0)
        made = build_router("ssr", D, E, 1, probability=probability, differentiable=True)
        skill = torch.zeros(E)
        optimizer = torch.optim.SGD(made.parameters(), lr=0.5)
        x = hidden() * 0.3 + 1.0
        for step in range(150):
            routing = made(x, RouterContext(1, T, training=True, step=step))
            skill = 0.9 * skill + 0.1 * routing.counts() / T * E
            optimizer.zero_grad()
            (-(routing.scores * skill).sum(1).mean()).backward()
            optimizer.step()
        load = made(x, RouterContext(1, T)).counts()
        return float(load.max() / load.mean() - 1)

    assert imbalance(0.3) <= imbalance(0.0)


def test_bad_options_are_told():
    with pytest.raises(UserError, match="probability 2"):
        router(probability=2)
    with pytest.raises(UserError, match="did you mean 'logits'"):
        router(transported="logit")
