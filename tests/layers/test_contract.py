"""What every registered router and expert type must keep to."""

import pytest
import torch

from moekit.layers import ExpertPool, MoELayer, Routing, build_bank, naive_pool
from tests.layers.examples import (
    EXPERT_OPTIONS,
    EXPERTS,
    EXPERTS_TYPES,
    ROUTERS,
    TOP_K,
    WIDTH,
    context,
    hidden,
    router,
)


def weights_by_token(routing: Routing) -> torch.Tensor:
    """The weight of every token and expert [T, E]; 0 where there is no pair."""
    dense = torch.zeros(routing.num_tokens, routing.num_experts)
    return dense.index_put((routing.token, routing.expert), routing.weight, accumulate=True)


@pytest.mark.parametrize("name", ROUTERS)
def test_pairs_are_sorted_and_in_range(name):
    routing = router(name)(hidden(), context())
    assert routing.num_tokens == 12
    assert routing.num_experts >= EXPERTS
    assert (routing.token.diff() >= 0).all()
    assert routing.token.dtype == routing.expert.dtype == torch.int64
    assert ((routing.expert >= 0) & (routing.expert < routing.num_experts)).all()
    assert len(routing.weight) == len(routing.token) == int(routing.counts().sum())
    twice = routing.token * routing.num_experts + routing.expert
    assert len(twice.unique()) == len(twice)
    if routing.top_k is not None:
        assert (torch.bincount(routing.token, minlength=12) == routing.top_k).all()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ROUTERS)
def test_a_causal_router_does_not_see_the_future(name, training):
    module, ctx = router(name), {"batch": 1, "length": 8, "training": training}
    seen = False
    for seed in range(8):
        first = hidden(1, 8, seed)
        changed = first.clone()
        changed[5:] = hidden(1, 8, seed + 100)[5:]
        before = weights_by_token(module(first, context(**ctx)))[:5]
        after = weights_by_token(module(changed, context(**ctx)))[:5]
        seen |= not torch.allclose(before, after, rtol=0, atol=1e-6)
    if module.causal:
        assert not seen
    elif training:
        # A router that says it leaks must be seen to, or the test above could not fail either.
        assert seen


@pytest.mark.parametrize("name", ROUTERS)
def test_other_sequences_do_not_matter(name):
    module = router(name)
    first = hidden(2, 6)
    changed = first.clone()
    changed[6:] = hidden(2, 6, 77)[6:]
    before = weights_by_token(module(first, context()))[:6]
    after = weights_by_token(module(changed, context()))[:6]
    assert module.sees_batch or torch.allclose(before, after, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ROUTERS)
def test_permuting_sequences_permutes_routes(name):
    module = router(name)
    if module.sees_batch:
        pytest.skip("sees the batch: places in an expert depend on the order")
    first, ctx = hidden(2, 6), context()
    order = torch.cat([torch.arange(6, 12), torch.arange(6)])
    turned = context(
        **{key: getattr(ctx, key)[order] for key in ("token_id", "token_type", "position")}
    )
    before = weights_by_token(module(first, ctx))[order]
    after = weights_by_token(module(first[order], turned))
    assert torch.allclose(before, after, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ROUTERS)
def test_the_task_teaches_the_router(name):
    module = router(name)
    learned = [param for param in module.parameters() if param.requires_grad]
    if not learned:
        pytest.skip("learns nothing")
    routing = module(hidden(), context(training=True))
    target = torch.randn(routing.weight.shape, generator=torch.Generator().manual_seed(3))
    (routing.weight * target).sum().backward()
    assert any(p.grad is not None and float(p.grad.abs().max()) > 0 for p in learned)


@pytest.mark.parametrize("name", ROUTERS)
def test_running_again_repeats_the_route(name):
    # What activation recomputation relies on.
    module, ctx = router(name), context(training=True, step=3, seed=5)
    first = module(hidden(), ctx.enter(1))
    again = module(hidden(), ctx.enter(1))
    assert torch.equal(weights_by_token(first), weights_by_token(again))


@pytest.mark.parametrize("name", ROUTERS)
def test_padding_does_not_count(name):
    mask = torch.ones(12, dtype=torch.bool)
    mask[3:6] = False
    routing = router(name)(hidden(), context(token_mask=mask))
    kept = mask[routing.token].sum()
    assert int(routing.counts().sum()) == int(kept)


def bank(name: str, count: int = 4):
    torch.manual_seed(0)
    return build_bank(name, WIDTH, count, **EXPERT_OPTIONS.get(name, {}))


@pytest.mark.parametrize("name", EXPERTS_TYPES)
def test_a_bank_equals_one_pair_at_a_time(name):
    pool = ExpertPool([bank(name)])
    with torch.no_grad():
        for param in pool.parameters():
            param.normal_(std=0.3)
    # Ragged, an expert (3) and a token (2) without pairs, one token with the same weight twice.
    routing = Routing(
        token=torch.tensor([0, 0, 1, 3, 3, 3]),
        expert=torch.tensor([1, 0, 1, 2, 1, 0]),
        weight=torch.tensor([0.5, 0.2, -0.3, 1.0, 0.1, 0.1]),
        num_tokens=4,
        num_experts=4,
    )
    same = []
    for run in (pool, lambda x, r: naive_pool(pool, x, r)):
        rows = hidden(1, 4).requires_grad_()
        weight = routing.weight.clone().requires_grad_()
        pool.zero_grad()
        out = run(rows, Routing(**{**vars(routing), "weight": weight}))
        # A dense upstream gradient: grouped_mm rejects an expanded one.
        if out.requires_grad:
            out.backward(torch.linspace(-1, 1, out.numel()).view_as(out))
        inputs = [rows, weight, *pool.parameters()]
        grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in inputs]
        same.append([out, *grads])
    for fast, slow in zip(*same, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ROUTERS)
def test_a_layer_of_every_router_runs(name):
    layer = MoELayer(router(name), ExpertPool([bank("swiglu", EXPERTS)]))
    ctx = context()
    out = layer(hidden().view(2, 6, WIDTH), ctx)
    assert out.shape == (2, 6, WIDTH)
    assert out.isfinite().all()
    (record,) = ctx.records
    layer.after_step(record.counts())
    assert record.counts().sum() <= 12 * max(TOP_K, EXPERTS)
