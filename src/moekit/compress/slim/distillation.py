"""Losses of a model against the one it came from, on the teacher's most likely tokens.

Shapes: B sequences, S tokens, V vocabulary, N most likely tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moekit.core.collect import Batch

TOP = 8


def likely_tokens(logits: Tensor, top: int = TOP) -> tuple[Tensor, Tensor]:
    """Ids [., N] and probabilities [., N], over the whole vocabulary, of the teacher's best."""
    probabilities, ids = logits.float().softmax(-1).topk(min(top, logits.shape[-1]), dim=-1)
    return ids, probabilities


def truncated_cross_entropy(logits: Tensor, ids: Tensor, probabilities: Tensor) -> Tensor:
    """- sum of p_teacher log p_student over the likely tokens, by token.

    Not normalised over them: where student and teacher are the same, a normalised divergence has no
    gradient, and every sensitivity would vanish.
    """
    logs = logits.float().log_softmax(-1).gather(-1, ids)
    return -(probabilities * logs).sum(-1)


def truncated_divergence(logits: Tensor, ids: Tensor, probabilities: Tensor) -> Tensor:
    """KL divergence of the student from the teacher among the likely tokens alone, by token."""
    wanted = probabilities / probabilities.sum(-1, keepdim=True)
    logs = logits.float().gather(-1, ids).log_softmax(-1)
    return (wanted * (wanted.clamp_min(1e-20).log() - logs)).sum(-1)


def logits_of(model: Any, batch: Batch) -> Tensor:
    """Logits [T, V] of the tokens of a batch that are no padding."""
    device = next(model.parameters()).device
    mask = None if batch.mask is None else batch.mask.to(device)
    found: Tensor = model(
        input_ids=batch.ids.to(device), attention_mask=mask, use_cache=False, **batch.inputs
    ).logits
    return found.flatten(0, 1) if mask is None else found[mask.bool()]


@torch.no_grad()
def teach(model: Any, batch: Batch, top: int = TOP) -> tuple[Tensor, Tensor]:
    """The teacher's likely tokens for a batch."""
    return likely_tokens(logits_of(model, batch), top)
