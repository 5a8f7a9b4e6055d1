"""Routers by type of token: the checks of MoIIE and Ming."""

import pytest
import torch

from moekit.core.errors import UserError
from moekit.layers import ExpertPool, MoELayer, RouterContext, build_bank, build_router
from moekit.layers.routers.typed import by_type, of_type, typed_balance_loss

D, T = 16, 40
TYPES = torch.arange(T) % 2


def hidden(seed: int = 0) -> torch.Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(seed))


def router(name: str, experts: int = 8, **options):
    torch.manual_seed(1)
    made = build_router(name, D, experts, 2, **options)
    torch.nn.init.normal_(made.score.weight)
    return made


def context(types: torch.Tensor | None = TYPES, **fields) -> RouterContext:
    return RouterContext(1, T, token_type=types, **fields)


@pytest.mark.parametrize("experts", [4, 8, 16])
def test_no_token_uses_an_expert_of_the_other_type(experts):
    made = router("moiie", experts)
    routing = made(hidden(), context())
    kind = TYPES[routing.token]
    shared, own = experts // 2, experts // 4
    for number in (0, 1):
        used = routing.expert[kind == number].unique()
        lowest = shared + number * own
        assert ((used < shared) | ((used >= lowest) & (used < lowest + own))).all()
        assert (used >= shared).any()
    _, weights = routing.topk()
    torch.testing.assert_close(weights.sum(1), torch.ones(T))


def test_one_router_over_all_experts_is_plain_top_k():
    made = router("typed", one_router=True)
    plain = build_router("softmax-renormalised", D, 8, 2)
    plain.score.weight = torch.nn.Parameter(made.score.weight[0].detach())
    ours, theirs = made(hidden(), context()), plain(hidden(), context())
    assert torch.equal(ours.expert, theirs.expert)
    assert torch.equal(ours.weight, theirs.weight)


def test_types_follow_from_token_ids_where_the_batch_has_none():
    made = router("ming", boundaries=[10, 20])
    ids = torch.arange(T) % 30
    by_id = made(hidden(), context(None, token_id=ids))
    given = made(hidden(), context(ids // 10))
    assert torch.equal(by_id.expert, given.expert)
    # Types of the batch come first.
    both = made(hidden(), context(ids // 10, token_id=ids * 0))
    assert torch.equal(both.expert, given.expert)


def test_equal_routers_are_one_and_changing_one_leaves_the_others_tokens_alone():
    made = router("ming")
    with torch.no_grad():
        made.score.weight.copy_(made.score.weight[:1].expand_as(made.score.weight).clone())
    types = torch.arange(T) % 3
    before = made(hidden(), context(types))
    # All types routed as type 0 would be.
    assert torch.equal(before.expert, made(hidden(), context(None)).expert)
    with torch.no_grad():
        made.score.weight[1].normal_()
    after = made(hidden(), context(types))
    moved = (before.expert.view(T, 2) != after.expert.view(T, 2)).any(1)
    assert moved[types == 1].any()
    assert not moved[types != 1].any()


def test_experts_of_one_type_do_not_matter_to_a_batch_of_the_other():
    torch.manual_seed(0)
    bank = build_bank("swiglu", D, 8, expert_width=8)
    layer = MoELayer(router("moiie"), ExpertPool([bank]))
    text = context(torch.zeros(T, dtype=torch.int64))
    before = layer(hidden()[None], text)
    with torch.no_grad():
        bank.gate_up_proj[6:].normal_()
    assert torch.equal(layer(hidden()[None], text), before)


def uneven(routing) -> torch.Tensor:
    """Switch's balance loss of the real tokens."""
    own = routing.scores[routing.token_mask]
    share = routing.counts() / routing.counts().sum()
    return routing.num_experts * (share * own.mean(0)).sum()


def test_imbalance_of_one_type_does_not_move_the_router_of_the_other():
    made = router("moiie")
    routing = made(hidden(), context())
    uneven(of_type(routing, 1)).backward()
    grad = made.score.weight.grad
    assert grad[1].any()
    assert not grad[0].any()
    made.zero_grad()
    both = by_type(made(hidden(), context()), uneven)
    expected = sum(uneven(of_type(routing, n)) for n in (0, 1))
    torch.testing.assert_close(both, expected)


def test_the_loss_by_type_is_one_a_type_at_balance_over_its_pool():
    made = router("moiie")
    trained = typed_balance_loss(made(hidden(), context()))
    with torch.no_grad():
        made.score.weight.zero_()
    # Even probabilities give one a type whatever the load, as Switch's loss does.
    even = typed_balance_loss(made(hidden(), context()))
    assert even.item() == pytest.approx(2, rel=1e-5)
    assert trained > even
    with pytest.raises(UserError, match="moiie"):
        typed_balance_loss(build_router("softmax-raw", D, 8, 2)(hidden(), context()))


def test_every_type_has_its_own_bias_and_the_pool_is_their_sum():
    made = router("typed", bias_rate=0.1)
    x = hidden()
    for _ in range(30):
        routing = made(x, context(training=True))
        made.after_step(routing.counts())
    bias = made.terms._items[0].expert_bias
    assert not torch.equal(bias[0], bias[1])
    assert not made.terms._items[0].seen.any()
    routing = made(x, context())
    own = [of_type(routing, n).counts() for n in (0, 1)]
    assert torch.equal(own[0] + own[1], routing.counts())
    # The weights stay those of the scores alone.
    ids, weights = routing.topk()
    chosen = routing.scores.gather(1, ids)
    torch.testing.assert_close(weights, chosen / chosen.sum(1, keepdim=True))


def test_the_bias_evens_out_each_type():
    def spread(rate: float) -> float:
        made = router("typed", bias_rate=rate)
        with torch.no_grad():
            made.score.weight.mul_(0.1)
        x = hidden() + 1.0
        for _ in range(200):
            made.after_step(made(x, context(training=True)).counts())
        counts = torch.stack([of_type(made(x, context()), n).counts() for n in (0, 1)])
        return float((counts.max(1).values / counts.mean(1)).mean())

    # The other rate is too small to change any choice.
    assert spread(0.005) < 0.8 * spread(1e-9)


def test_bad_types_and_pools_are_told():
    with pytest.raises(UserError, match="in fours"):
        router("moiie", 6)
    with pytest.raises(UserError, match="do not divide among 3 types"):
        router("typed", types=3, shared=1)
    with pytest.raises(UserError, match="exceeds the 1 experts"):
        router("typed", 2, types=2, shared=0)
    with pytest.raises(UserError, match="part 2 types of ids, not 3"):
        router("ming", boundaries=[7])
    with pytest.raises(UserError, match="do not ascend"):
        router("ming", boundaries=[7, 7])
    with pytest.raises(UserError, match="from 0 to 5"):
        router("typed")(hidden(), context(torch.arange(T) % 6))
