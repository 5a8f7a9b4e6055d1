"""AdaMoE: the checks of its method section."""

import pytest
import torch

from moekit.core.errors import UserError
from moekit.layers import ExpertPool, MoELayer, RouterContext, build_bank, build_router
from moekit.layers.routers.null_experts import with_null_rows

D, E, K, T = 16, 4, 2, 24


def hidden(seed: int = 0) -> torch.Tensor:
    return torch.randn(1, T, D, generator=torch.Generator().manual_seed(seed))


def plain_layer() -> MoELayer:
    torch.manual_seed(1)
    router = build_router("softmax-renormalised", D, E, K)
    torch.nn.init.normal_(router.score.weight)
    return MoELayer(router, ExpertPool([build_bank("swiglu", D, E, expert_width=8)]))


def null_layer(plain: MoELayer, copies: int, top_k: int) -> MoELayer:
    """`plain` with `copies` * E null experts whose router rows copy the real ones."""
    null = copies * E
    router = build_router("adamoe", D, E + null, top_k, null=null)
    router.score.weight = torch.nn.Parameter(with_null_rows(plain.router.score.weight, copies))
    banks = [plain.pool.banks[0]] + ([build_bank("zero", D, null)] if null else [])
    return MoELayer(router, ExpertPool(banks))


def test_copied_rows_start_as_the_original_layer():
    plain = plain_layer()
    x = hidden()
    expected = plain(x)
    for copies in (1, 2):
        # Not bit for bit: the softmax of copied rows divides by a larger sum before it cancels.
        torch.testing.assert_close(
            null_layer(plain, copies, (1 + copies) * K)(x), expected, rtol=1e-5, atol=1e-6
        )


def test_without_null_experts_it_is_plain_top_k():
    plain = plain_layer()
    assert torch.equal(null_layer(plain, 0, K)(hidden()), plain(hidden()))


def test_weights_sum_to_one_over_real_experts_and_null_ones_have_none():
    router = build_router("adamoe", D, 6, 2, null=3)
    torch.nn.init.normal_(router.score.weight)
    routing = router(hidden()[0], RouterContext(1, T))
    ids, weights = routing.topk()
    real = ids < 3
    assert (weights[~real] == 0).all()
    some = real.any(1)
    assert some.any()
    assert not some.all()
    torch.testing.assert_close(weights.sum(1), some.float())


def test_a_token_of_null_experts_alone_gets_nothing():
    router = build_router("adamoe", D, 4, 2, null=2)
    with torch.no_grad():
        router.score.weight.zero_()
        router.score.weight[2:, 0] = 5.0
    x = hidden().abs()
    pool = ExpertPool([build_bank("swiglu", D, 2, expert_width=8), build_bank("zero", D, 2)])
    assert not MoELayer(router, pool)(x).any()


def test_permuting_null_rows_changes_nothing():
    layer = null_layer(plain_layer(), 2, 4)
    with torch.no_grad():
        layer.router.score.weight.add_(0.1 * torch.randn(3 * E, D))
    expected = layer(hidden())
    with torch.no_grad():
        null = layer.router.score.weight[E:]
        null.copy_(null.flip(0).clone())
    # The softmax adds the null experts up in another order.
    torch.testing.assert_close(layer(hidden()), expected, rtol=1e-5, atol=1e-8)


def test_the_number_of_real_experts_tracks_balance_as_its_loss_grows():
    """The task wants real experts alone; at balance half of the four choices are real."""
    excess = []
    for weight in (0.0, 0.3, 3.0):
        router = build_router("adamoe", D, 8, 4, null=4)
        torch.nn.init.normal_(
            router.score.weight, std=0.1, generator=torch.Generator().manual_seed(1)
        )
        optimizer = torch.optim.Adam(router.parameters(), lr=0.02)
        for _ in range(100):
            routing = router(hidden()[0], RouterContext(1, T))
            share = routing.counts() / routing.counts().sum()
            share = torch.cat([share[:4], share[4:].mean().expand(4)])
            balance = 8 * (share * routing.scores.mean(0)).sum()
            loss = weight * balance - 0.1 * routing.scores[:, :4].log().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        real = float(router(hidden()[0], RouterContext(1, T)).counts()[:4].sum()) / T
        excess.append(abs(real - 2.0))
    assert excess[0] > 1.5
    assert excess[0] > excess[1] > excess[2]
    assert excess[2] < 0.25


def test_bad_numbers_of_null_experts_are_told():
    with pytest.raises(UserError, match="null 4 is not between 0 and 3"):
        build_router("adamoe", D, 4, 2, null=4)
