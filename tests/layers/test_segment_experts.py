"""Experts of whole segments and the shared expert beside them (Seg-MoE)."""

import pytest
import torch
import torch.nn.functional as F

from moekit.core.errors import UserError
from moekit.layers import ExpertPool, MoELayer, RouterContext, build_bank, build_router

B, S, D, E, W = 2, 10, 16, 4, 4


def hidden() -> torch.Tensor:
    return torch.randn(B, S, D, generator=torch.Generator().manual_seed(0))


def layer(size: int = W, **options) -> MoELayer:
    torch.manual_seed(1)
    made = MoELayer(
        build_router("segment", D, E, 2, size=size),
        ExpertPool([build_bank("segment", D, E, expert_width=8, size=W, **options)]),
    )
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_a_layer_is_what_one_segment_at_a_time_gives(whole, shared):
    made, context = layer(whole=whole, shared=shared), RouterContext(B, S)
    x = hidden()
    out = made(x, context)
    ids, weights = (part.view(B, S, 2) for part in context.records[0].topk())
    bank = made.pool.banks[0]
    for b in range(B):
        for start in range(0, S, W):
            length = min(W, S - start)
            unit = torch.zeros(W, D)
            unit[:length] = x[b, start : start + length]
            expected = torch.zeros(W, D)
            for e, w in zip(ids[b, start].tolist(), weights[b, start], strict=True):
                rows = unit.flatten()[None] if whole else unit
                own = F.gelu(rows @ bank.up[e].T) @ bank.down[e].T
                expected = expected + w * own.view(W, D)
            if shared:
                flat = unit.flatten()
                own = F.gelu(flat @ bank.shared_up.T) @ bank.shared_down.T
                expected = expected + torch.sigmoid(flat @ bank.gate[0]) * own.view(W, D)
            # Sums of up to 64 terms in another order.
            torch.testing.assert_close(
                out[b, start : start + length], expected[:length], rtol=1e-4, atol=1e-5
            )


def test_padding_adds_nothing_to_a_segment():
    made, x = layer(whole=True), hidden()
    mask = torch.ones(B, S, dtype=torch.bool)
    mask[:, 6:] = False
    noisy = x.clone()
    noisy[~mask] = 1e4
    out = made(noisy, RouterContext(B, S, token_mask=mask.flatten()))
    alone = made(x[:, :6], RouterContext(B, 6))
    torch.testing.assert_close(out[:, :6], alone, rtol=1e-4, atol=1e-5)


def test_mixing_positions_is_not_causal_whatever_the_router():
    made = layer()
    made.router = build_router("softmax-raw", D, E, 2)
    assert made.router.causal
    assert not made.causal
    assert not made.decodes


def test_segments_that_do_not_match_are_told():
    with pytest.raises(UserError, match="give both the same size"):
        layer(size=5)(hidden())
