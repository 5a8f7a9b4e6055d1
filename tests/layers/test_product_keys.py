"""Monet: the checks of its method section, router and both decompositions."""

import math

import pytest
import torch

from moekit.core.errors import UserError
from moekit.layers import ExpertPool, MoELayer, RouterContext, build_bank, build_router
from moekit.layers.routers.product_keys import (
    FIRST,
    LOGITS,
    SECOND,
    ambiguity_loss,
    composed_weights,
    set_sizes,
    uniformity_loss,
)

D, T = 16, 12
KINDS = ["monet-horizontal", "monet-vertical"]


def hidden(tokens: int = T, seed: int = 0) -> torch.Tensor:
    return torch.randn(tokens, D, generator=torch.Generator().manual_seed(seed))


def router(experts: int = 25, top_k: int = 2, **options):
    torch.manual_seed(1)
    made = build_router("monet", D, experts, top_k, **options)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return made


def bank(kind: str, experts: int = 25, **options):
    torch.manual_seed(2)
    made = build_bank(kind, D, experts, expert_width=8, **options)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return made


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_factored_is_the_explicit_double_sum(kind, heads):
    experts, made = bank(kind), router(heads=heads)
    context = RouterContext(1, T)
    x = hidden()
    routing = made(x, context)
    weights = composed_weights(routing.extra).detach()
    expected = torch.zeros_like(x)
    for i in range(5):
        for j in range(5):
            expected += weights[:, i, j, None] * experts.run_one(5 * i + j, x)
    out = ExpertPool([experts])(x, routing)
    # A sum of 25 experts in another order.
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    listed = router(heads=heads, explicit=True)(x, RouterContext(1, T))
    torch.testing.assert_close(ExpertPool([experts])(x, listed), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_factored_and_listed_agree(kind):
    grads = []
    for explicit in (False, True):
        experts, made = bank(kind), router(explicit=explicit)
        x = hidden().requires_grad_()
        ExpertPool([experts])(x, made(x, RouterContext(1, T))).square().sum().backward()
        grads.append([x.grad, made.weight.grad, *(p.grad for p in experts.parameters())])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_parameters_grow_with_the_square_root_of_the_experts():
    def numbers(side: int) -> int:
        parts = [bank(KINDS[0], side**2), router(side**2)]
        return sum(p.numel() for part in parts for p in part.parameters())

    assert numbers(32) == 2 * numbers(16)


def test_about_top_k_half_experts_pass_once_the_statistics_have_settled():
    made = router(64 * 64, 8)
    for seed in range(60):
        made(hidden(200, seed), RouterContext(1, 200, training=True))
    made.eval()
    routing = made(hidden(2000, 99), RouterContext(1, 2000))
    for name in (FIRST, SECOND):
        kept = (routing.extra[name] > 0).sum(-1).float()
        # Logits of different half-experts differ in their variance, so the number is only near.
        assert 6 < float(kept.mean()) < 10
        assert kept.min() >= 1
    # Nothing passes: the largest does, alone.
    for norm in made.norms:
        norm.mean.fill_(1e6)
    alone = made(hidden(), RouterContext(1, T))
    assert torch.equal((alone.extra[FIRST] > 0).sum(-1), torch.ones(T, 2, dtype=torch.int64))


def test_padding_stays_out_of_the_statistics():
    mask = torch.arange(T) < 7
    noisy = hidden()
    noisy[~mask] = 1e5
    made = router()
    made(noisy, RouterContext(1, T, training=True, token_mask=mask))
    other = router()
    other(noisy[:7], RouterContext(1, 7, training=True))
    for one, two in zip(made.norms, other.norms, strict=True):
        torch.testing.assert_close(one.mean, two.mean)
        torch.testing.assert_close(one.variance, two.variance)


def test_removing_a_column_of_experts_is_removing_their_half():
    """Horizontal, masking all (i0, j) = zeroing half-expert i0, but for the biases' share."""
    experts, x = bank(KINDS[0]), hidden()
    routing = router(explicit=True, heads=1)(x, RouterContext(1, T))
    kept = routing.expert // 5 != 2
    pairs = type(routing.pairs)(*(values[kept] for values in routing.pairs))
    masked = experts(x, pairs)
    gates = router(heads=1)(x, RouterContext(1, T)).extra
    with torch.no_grad():
        experts.up[2] = 0
        experts.up_bias[2] = 0
        whole = experts(x, routing.pairs)
        bias = gates[FIRST][:, 0, 2, None] * (gates[SECOND][:, 0] @ experts.down_bias)
    torch.testing.assert_close(masked, whole - bias, rtol=1e-4, atol=1e-5)


def test_pairs_of_the_record_are_each_heads_strongest_expert():
    routing = router(heads=3)(hidden(), RouterContext(1, T))
    first, second = routing.extra[FIRST], routing.extra[SECOND]
    for token in range(T):
        expected: dict[int, float] = {}
        for h in range(3):
            one, two = first[token, h], second[token, h]
            expert = int(one.argmax()) * 5 + int(two.argmax())
            expected[expert] = expected.get(expert, 0) + (one.max() * two.max()).item()
        own = routing.token == token
        found = dict(zip(routing.expert[own].tolist(), routing.weight[own].tolist(), strict=True))
        assert found == pytest.approx(expected)
        assert (routing.weight[own].diff() <= 0).all()


def test_a_later_layer_may_reuse_the_decision():
    x = hidden()[None]
    layers = [
        MoELayer(router(), ExpertPool([bank(KINDS[1])])),
        MoELayer(router(reuse=True), ExpertPool([bank(KINDS[1])])),
    ]
    context = RouterContext(1, T)
    first = context.enter(0)
    layers[0](x, first)
    second = first.enter(1)
    layers[1](2 * x, second)
    assert torch.equal(second.records[1].extra[FIRST], second.records[0].extra[FIRST])
    assert [record.layer for record in second.records] == [0, 1]
    assert not list(layers[1].router.parameters())
    with pytest.raises(UserError, match="needs one without"):
        layers[1](x, RouterContext(1, T))


def test_losses_at_balance_and_at_certainty():
    made = router(64, 2)
    with torch.no_grad():
        made.weight.zero_()
    even = made(hidden(), RouterContext(1, T))
    assert uniformity_loss(even).item() == pytest.approx(math.log(8), rel=1e-6)
    sure = router(64, 2)
    with torch.no_grad():
        sure.weight.mul_(1e6)
    assert ambiguity_loss(sure(hidden(), RouterContext(1, T))).item() < 1e-3
    routing = router(64)(hidden(), RouterContext(1, T))
    assert uniformity_loss(routing) > math.log(8)
    expected = -sum(routing.extra[name].softmax(-1).mean(0).log().sum() for name in LOGITS) / (
        2 * 2 * 8
    )
    torch.testing.assert_close(uniformity_loss(routing), expected)


def test_sets_need_not_be_equal_and_must_match():
    assert set_sizes(12, None) == (3, 4)
    assert set_sizes(12, 6) == (6, 2)
    with pytest.raises(UserError, match="first 5 does not divide"):
        set_sizes(12, 5)
    routing = router(12, first=6)(hidden(), RouterContext(1, T))
    with pytest.raises(UserError, match="give both the same option first"):
        ExpertPool([bank(KINDS[0], 12)])(hidden(), routing)
    out = ExpertPool([bank(KINDS[0], 12, first=6)])(hidden(), routing)
    assert out.isfinite().all()
    with pytest.raises(UserError, match="only bank"):
        ExpertPool([bank(KINDS[0]), build_bank("zero", D, 1)])
