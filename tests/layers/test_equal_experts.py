"""A layer grown from a dense block, all experts equal: what it computes before training.

The checks of DiT-MoE's upcycling and of Uni-MoE's assembled experts.
"""

import pytest
import torch

from moekit.layers import ExpertPool, MoELayer, RouterContext, build_bank, build_router

D, E, T = 16, 4, 18


def hidden() -> torch.Tensor:
    return torch.randn(1, T, D, generator=torch.Generator().manual_seed(0))


def layer(router: str, **options) -> MoELayer:
    torch.manual_seed(1)
    bank = build_bank("swiglu", D, E, expert_width=24)
    with torch.no_grad():
        for weight in bank.parameters():
            weight.normal_(std=0.3)
            weight.copy_(weight[:1].expand_as(weight).clone())
    made = MoELayer(build_router(router, D, E, 2, **options), ExpertPool([bank]))
    for weight in made.router.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return made


@pytest.mark.parametrize(
    "router", ["softmax-renormalised", "moiie", "ming", "segment", "chunk", "mode", "comet"]
)
def test_weights_that_sum_to_one_give_the_dense_block_whatever_the_router(router):
    made = layer(router)
    context = RouterContext(1, T, token_type=torch.arange(T) % 2)
    dense = made.pool.run_one(0, hidden()[0])
    # Two halves of the same value are added.
    torch.testing.assert_close(made(hidden(), context)[0], dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("router", ["softmax-raw", "switch-dit", "moduleformer"])
def test_raw_weights_scale_the_dense_block_by_their_sum(router):
    made, context = layer(router), RouterContext(1, T)
    out = made(hidden(), context)[0]
    best = context.records[0].scores.topk(2, -1).values.sum(-1, keepdim=True)
    dense = made.pool.run_one(0, hidden()[0])
    torch.testing.assert_close(out, best * dense, rtol=1e-4, atol=1e-5)
    assert best.min() < 0.99
