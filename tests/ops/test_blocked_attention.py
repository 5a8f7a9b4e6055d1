"""Blocked causal attention against torch's own."""

import pytest
import torch
import torch.nn.functional as F

from moekit.core.errors import UserError
from moekit.ops import blocked_attention
from moekit.ops.blocked_attention import blocked_causal_attention


@pytest.mark.parametrize(("length", "block"), [(1, 4), (8, 4), (13, 4), (5, 16)])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_equals_scaled_dot_product_attention(length: int, block: int, groups: int) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, length, 8, generator=generator, requires_grad=True)
    key = torch.randn(2, groups, length, 8, generator=generator, requires_grad=True)
    value = torch.randn(2, groups, length, 8, generator=generator, requires_grad=True)
    upstream = torch.randn(2, 4, length, 8, generator=generator)
    ours = blocked_causal_attention(query, key, value, 0.3, block)
    theirs = F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)  # fp32 sums in another order
    for mine, other in zip(
        torch.autograd.grad(ours, (query, key, value), upstream),
        torch.autograd.grad(theirs, (query, key, value), upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_refuses_what_it_would_silently_ignore() -> None:
    from transformers import AttentionInterface

    attention = AttentionInterface()[blocked_attention.register()]
    part = torch.zeros(1, 1, 2, 8)
    with pytest.raises(UserError, match="padding mask"):
        attention(None, part, part, part, torch.zeros(1, 1, 2, 2), 1.0)
    with pytest.raises(UserError, match="window"):
        attention(None, part, part, part, None, 1.0, sliding_window=4)
