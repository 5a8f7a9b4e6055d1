"""Causal attention in query blocks, for training on CPUs.

Torch's flash attention for CPUs reaches about a tenth of the matrix throughput of bf16 at head
width 64 and short sequences. Plain products over query blocks that stop at the diagonal do half
the work of a full score matrix and run at full speed; the softmax between them fuses under
`torch.compile`.
"""

import torch
from torch import Tensor

from moekit.core.errors import UserError

NAME = "moekit_blocked"
BLOCK = 128


def blocked_causal_attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, block: int = BLOCK
) -> Tensor:
    """Causal attention of `query` [B, H, S, d] over `key`, `value` [B, G, S, d], H a multiple of G.

    Returns [B, H, S, d]. No padding mask, no window: sequences are packed.
    """
    batch, heads, length, width = query.shape
    groups = key.shape[1]
    share = heads // groups
    query = (query * scaling).reshape(batch * groups, share, length, width)
    key = key.reshape(batch * groups, length, width)
    value = value.reshape(batch * groups, length, width)
    outputs = []
    for start in range(0, length, block):
        stop = min(length, start + block)
        rows = stop - start
        part = query[:, :, start:stop].reshape(batch * groups, share * rows, width)
        scores = torch.bmm(part, key[:, :stop].transpose(1, 2)).float()
        scores = scores.view(batch * groups, share, rows, stop)
        visible = torch.ones(rows, stop, dtype=torch.bool, device=query.device).tril(start)
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1).to(value.dtype)
        mixed = torch.bmm(weights.view(batch * groups, share * rows, stop), value[:, :stop])
        outputs.append(mixed.view(batch * groups, share, rows, width))
    return torch.cat(outputs, 2).view(batch, heads, length, width)


def _attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    if attention_mask is not None or dropout or kwargs.get("sliding_window") is not None:
        raise UserError(
            f"attention '{NAME}' is for packed sequences with plain causal attention: no padding "
            "mask, window or dropout; use attention: sdpa."
        )
    return blocked_causal_attention(query, key, value, scaling).transpose(1, 2), None


def register() -> str:
    """Make the attention known to transformers and return its name."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attention)
    return NAME
