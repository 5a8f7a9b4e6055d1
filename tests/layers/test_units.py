"""Routers of segments and chunks: the checks of Seg-MoE and Hydra."""

import pytest
import torch

from moekit.core.errors import UserError
from moekit.layers import ExpertPool, MoELayer, RouterContext, build_bank, build_router
from moekit.layers.weigh import RenormalisedWeights

B, S, D, E = 2, 10, 16, 6


def hidden(seed: int = 0) -> torch.Tensor:
    return torch.randn(B * S, D, generator=torch.Generator().manual_seed(seed))


def router(name: str = "segment", top_k: int = 2, **options):
    torch.manual_seed(1)
    made = build_router(name, D, E, top_k, **options)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return made


def context(**fields) -> RouterContext:
    return RouterContext(B, S, **fields)


@pytest.mark.parametrize("name", ["segment", "chunk"])
def test_size_one_is_the_plain_router_bit_for_bit(name):
    made = router(name, size=1)
    plain = build_router("softmax-renormalised", D, E, 2)
    plain.score.weight = made.score.weight
    ours, theirs = made(hidden(), context()), plain(hidden(), context())
    assert torch.equal(ours.expert, theirs.expert)
    assert torch.equal(ours.weight, theirs.weight)


@pytest.mark.parametrize("name", ["segment", "chunk"])
def test_the_tokens_of_a_segment_share_their_experts_and_each_is_routed_by_the_naive_key(name):
    made, x = router(name, size=4), hidden()
    ids, weights = made(x, context()).topk()
    for b in range(B):
        for start in range(0, S, 4):
            rows = x[b * S + start : b * S + min(start + 4, S)]
            if name == "segment":
                padded = torch.cat([rows, torch.zeros(4 - len(rows), D)])
                key = padded.flatten()
            else:
                key = rows.mean(0)  # of the tokens there are, not of zeros that stand for none
            scores = (made.score.weight @ key).softmax(0)
            best, expected = scores.topk(2)
            span = slice(b * S + start, b * S + start + len(rows))
            assert (ids[span] == expected).all()
            # One sum in another order than a matrix product's.
            torch.testing.assert_close(
                weights[span], (best / best.sum()).expand(len(rows), 2), rtol=1e-4, atol=1e-6
            )


def test_a_chunk_as_long_as_the_sequence_is_one_choice_a_sequence():
    long, whole = router("chunk", size=S), router("chunk", size=None)
    assert torch.equal(long(hidden(), context()).expert, whole(hidden(), context()).expert)
    assert len(whole(hidden(), context()).expert.view(B, S, 2).unique(dim=1)[0]) == 1


def test_permuting_segments_permutes_outputs_and_permuting_inside_moves_the_router_only():
    torch.manual_seed(0)
    bank = build_bank("swiglu", D, E, expert_width=8)
    layer = MoELayer(router(size=5), ExpertPool([bank]))
    x = hidden().view(B, S, D)
    swapped = torch.cat([x[:, 5:], x[:, :5]], 1)
    out = layer(x)
    torch.testing.assert_close(layer(swapped), torch.cat([out[:, 5:], out[:, :5]], 1))
    order = torch.tensor([3, 1, 4, 0, 2])
    ctx = context()
    layer(x[:, torch.cat([order, order + 5])], ctx)
    # The same experts on the same tokens: position by position once the route is the same.
    with torch.no_grad():
        layer.router.score.weight.zero_()
    inside = layer(x[:, torch.cat([order, order + 5])])
    torch.testing.assert_close(inside, layer(x)[:, torch.cat([order, order + 5])])


@pytest.mark.parametrize("renormalised", [False, True])
def test_the_task_reaches_the_router_of_one_expert_by_its_raw_weight_alone(renormalised):
    made = router(top_k=1)
    if renormalised:
        made.weigh = RenormalisedWeights()
    (made(hidden(), context()).weight * torch.arange(B * S)).sum().backward()
    size = float(made.score.weight.grad.abs().max())
    # The gradient of x / x is zero but for rounding.
    assert size < 1e-5 if renormalised else size > 1e-1


def test_one_expert_renormalised_is_refused():
    with pytest.raises(UserError, match="every weight 1"):
        router(top_k=1, weights="renormalised")


def test_a_length_that_does_not_divide_and_padding_leave_no_trace():
    made, x = router(size=4, key="mean"), hidden()
    mask = torch.ones(B, S, dtype=torch.bool)
    mask[:, 6:] = False
    noisy = x.clone()
    noisy[~mask.flatten()] = 1e6
    routing = made(noisy, context(token_mask=mask.flatten()))
    assert routing.weight.isfinite().all()
    real = mask.flatten()[routing.token]
    plain = made(x.view(B, S, D)[:, :6].flatten(0, 1), RouterContext(B, 6))
    assert torch.equal(routing.expert[real], plain.expert)
    assert routing.unit_mask().tolist() == [True, True, False] * B


@pytest.mark.parametrize("delay", [0, 1])
def test_delay_is_the_causal_repair(delay):
    """A later token of a segment moves earlier ones' route only without the delay."""
    made = router("chunk", size=5, delay=delay)
    assert made.causal == bool(delay)
    seen = False
    for seed in range(10):
        x = hidden(seed)
        changed = x.clone()
        changed[8] = 5 * hidden(seed + 50)[8]
        before, after = made(x, context()), made(changed, context())
        early = before.token < 8
        seen |= not torch.equal(before.expert[early], after.expert[early])
    assert seen == (not delay)


def test_a_delayed_segment_takes_the_decision_of_the_one_before():
    delayed = router("chunk", size=5, delay=1)
    plain = build_router("chunk", D, E, 2, size=5)
    plain.score.weight = delayed.score.weight
    now = plain(hidden(), context()).expert.view(B, 2, 5, 2)
    later = delayed(hidden(), context()).expert.view(B, 2, 5, 2)
    assert torch.equal(later[:, 1], now[:, 0])


def test_dropout_acts_in_training_alone_and_alike_on_choice_and_weights():
    made = router(dropout=0.5)
    plain = router()
    assert torch.equal(made(hidden(), context()).weight, plain(hidden(), context()).weight)
    routing = made(hidden(), context(training=True))
    again = made(hidden(), context(training=True))
    assert torch.equal(routing.weight, again.weight)
    ids, weights = routing.topk()
    kept = weights.sum(1)
    # Renormalised over what was left; nothing where both of the two were dropped.
    assert ((kept - 1).abs() < 1e-5).logical_or(kept == 0).all()
    assert not torch.equal(routing.expert, plain(hidden(), context()).expert)
    assert ids.shape == (B * S, 2)


def test_a_cache_is_refused():
    position = torch.arange(3, 3 + S).repeat(B)
    with pytest.raises(UserError, match="use_cache=False"):
        router()(hidden(), context(position=position))


def test_bad_options_are_told():
    with pytest.raises(UserError, match="size 0"):
        router(size=0)
    with pytest.raises(UserError, match="needs key mean"):
        router(size=None)
    with pytest.raises(UserError, match="delay 2"):
        router(delay=2)
