"""MoE++: the checks of its method section."""

import pytest
import torch

from moekit.core.errors import UserError
from moekit.layers import ExpertPool, MoELayer, RouterContext, Routing, build_bank, build_router
from moekit.layers.routers.zero_computation import typed_shares

D, F, K, T = 16, 3, 2, 64  # F experts that compute


def hidden(seed: int = 0) -> torch.Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(seed))


def pool() -> ExpertPool:
    torch.manual_seed(0)
    return ExpertPool(
        [
            build_bank("swiglu", D, F, expert_width=8),
            build_bank("copy", D, 1),
            build_bank("constant", D, 1),
            build_bank("zero", D, 1),
        ]
    )


def router(num_experts: int = F + 3, **options):
    made = build_router("moe++", D, num_experts, K, **options)
    generator = torch.Generator().manual_seed(1)
    torch.nn.init.normal_(made.score.score.weight, generator=generator)
    return made


def test_without_free_experts_and_residual_it_is_plain_top_k():
    made = router(F, residual="none", capacity=None)
    plain = build_router("softmax-raw", D, F, K)
    plain.score.weight = made.score.score.weight
    ours, theirs = made(hidden(), RouterContext(1, T)), plain(hidden(), RouterContext(1, T))
    assert torch.equal(ours.expert, theirs.expert)
    assert torch.equal(ours.weight, theirs.weight)
    # A learned map starts at zero, hence from the same route whatever the layer before said.
    learned = router(F, capacity=None)
    context = RouterContext(1, T)
    learned(hidden(1), context)
    assert torch.equal(learned(hidden(), context).weight, ours.weight)


def test_logits_of_the_layer_before_come_in_and_the_sum_goes_on():
    first, second, third = (router(residual=r) for r in ("learned", "identity", "identity"))
    context = RouterContext(1, T)
    one, two, three = (r(hidden(), context) for r in (first, second, third))
    torch.testing.assert_close(two.logits, 2 * one.logits)
    torch.testing.assert_close(three.logits, 3 * one.logits)
    three.logits.sum().backward()
    assert first.score.score.weight.grad.any()


def test_layers_of_different_size_are_told():
    context = RouterContext(1, T)
    router()(hidden(), context)
    with pytest.raises(UserError, match="needs equal numbers"):
        router(F)(hidden(), context)


def test_choosing_zero_and_copy_returns_the_weighted_token():
    x = hidden()[:1]
    copy, zero = F, F + 2
    routing = Routing.from_topk(torch.tensor([[copy, zero]]), torch.tensor([[0.3, 0.6]]), F + 3)
    torch.testing.assert_close(pool()(x, routing), 0.3 * x)


def test_released_weights_leave_the_other_expert_with_weight_one():
    made = router(weights="real", null=1, capacity=None)
    ids, weights = made(hidden(), RouterContext(1, T)).topk()
    with_zero = (ids == F + 2).any(1)
    assert with_zero.any()
    assert not with_zero.all()
    torch.testing.assert_close(weights.sum(1), torch.ones(T))
    assert (weights[ids == F + 2] == 0).all()


def test_places_follow_the_type_and_sum_to_all_pairs():
    made = router(tau=0.5, capacity=1.0)
    layer, context = MoELayer(made, pool()), RouterContext(1, T, training=True)
    layer(hidden().view(1, T, D), context)
    (routing,) = context.records
    # 128 pairs over shares 1/9 for the three that compute and 2/9 for the free ones.
    places = torch.tensor([15, 15, 15, 29, 29, 29])
    assert torch.equal(made.edits._items[0].places(routing, 1.0), places)
    assert (routing.counts() <= places).all()
    assert routing.num_dropped == T * K - int(routing.counts().sum())
    assert torch.equal(routing.counts(), torch.minimum(routing.wanted(), places))


def test_shares_predict_the_part_that_is_computed():
    free = torch.tensor([False] * 8 + [True] * 4)
    for tau in (0.1, 0.75, 1.0):
        shares = typed_shares(free, tau)
        torch.testing.assert_close(shares.sum(), torch.tensor(1.0))
        # tau N_F / (tau N_F + N_Z) of the paper.
        predicted = tau * 8 / (tau * 8 + 4)
        assert float(shares[~free].sum()) == pytest.approx(predicted, abs=1e-6)


def test_a_lower_tau_computes_fewer_experts():
    """The router learns the balance that tau asks for; so do its places, training or not."""
    means = []
    for tau in (0.1, 0.5, 1.0):
        made = router(tau=tau, capacity=None, residual="none")
        optimizer = torch.optim.Adam(made.parameters(), lr=0.05)
        eta = torch.tensor([1.0] * F + [tau] * 3)
        for _ in range(60):
            routing = made(hidden(), RouterContext(1, T, training=True))
            loss = (eta * routing.counts() / T * routing.scores.mean(0)).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        means.append(float(made(hidden(), RouterContext(1, T)).counts()[:F].sum()) / T)
    assert means[0] < means[1] < means[2]


def test_bad_options_are_told():
    with pytest.raises(UserError, match="tau 0 is not above 0"):
        router(tau=0)
    with pytest.raises(UserError, match="null 1 is for weights real"):
        router(null=1)
    with pytest.raises(UserError, match="did you mean 'learned'"):
        router(residual="learnt")
