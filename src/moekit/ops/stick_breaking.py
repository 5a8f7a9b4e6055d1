"""Stick-breaking attention: every query breaks its stick at the nearest key first.

ModuleFormer, arXiv 2306.04640. Needs no encoding of positions. Shapes: B batch, H heads,
S sequence, A head width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def stick_breaking_weights(logits: Tensor) -> Tensor:
    """Attention weights [..., S, S] of `logits` [..., S, S], zero above the diagonal.

    With b = sigmoid(logits), weight (i, j) is b_ij * prod of (1 - b_it) over j < t <= i. A row sums
    to 1 - prod over t <= i of (1 - b_it), so at most to one. Computed as a sum of logarithms.
    """
    future = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
    # Keys of the future break nothing off: the logarithm of what they leave is zero.
    left = functional.logsigmoid(-logits).masked_fill(future, 0.0)
    from_here = left.flip(-1).cumsum(-1).flip(-1)
    log_weights = functional.logsigmoid(logits) + from_here - left
    return log_weights.exp().masked_fill(future, 0.0)


def stick_breaking_attention(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None = None
) -> Tensor:
    """Attended values [B, H, S, A] of `query`, `key` and `value` [B, H, S, A]; scaled by 1/sqrt(A).

    Keys where `key_mask` [B, S] is False get no weight and break nothing off. The weights are
    computed in float32 whatever the inputs are.
    """
    logits = query.float() @ key.float().transpose(-2, -1) * query.shape[-1] ** -0.5
    if key_mask is not None:
        logits = logits.masked_fill(~key_mask[:, None, None, :], float("-inf"))
    return stick_breaking_weights(logits).to(value.dtype) @ value
