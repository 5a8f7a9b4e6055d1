"""The routing rule that a `LayerSpec` claims, computed step by step from the router's logits.

Shapes: T tokens, C choices, K chosen, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moekit.core.layer import MoELayer
from moekit.core.layer_spec import LayerSpec

SCORES = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda logits: F.softplus(logits).sqrt(),
}


def claimed_weights(
    spec: LayerSpec,
    logits: Tensor,
    bias: Tensor | None = None,
    hash_ids: Tensor | None = None,
    shared_logits: Tensor | None = None,
    expert_scale: Tensor | None = None,
    jitter: float = 0.0,
) -> Tensor:
    """Weights [T, C], zero where not chosen, of logits [T, C] under the rule of `spec`."""
    logits = logits * spec.logit_scale
    if spec.logit_cap:
        logits = torch.tanh(logits / spec.logit_cap) * spec.logit_cap
    if spec.score == "sparsemixer":
        return _sparsemixer(logits, spec.top_k, jitter)
    scores = SCORES[spec.score](logits)
    choice = logits if spec.bias_on == "logits" else scores
    if spec.has_correction_bias:
        choice = choice + bias
    if spec.num_groups > 1:
        choice = _limit_to_groups(choice, spec)
    ids = hash_ids if spec.selection == "hash" else choice.topk(spec.top_k).indices
    weights = scores.gather(-1, ids)
    if spec.normalize:
        total = weights.sum(-1, keepdim=True)
        if spec.normalizes_with_shared:
            total = total + SCORES[spec.score](shared_logits).sum(-1, keepdim=True)
        weights = weights / total
    if spec.has_expert_scale:
        weights = weights * expert_scale[ids]
    return torch.zeros_like(logits).scatter(-1, ids, weights * spec.scaling)


def claimed_weights_of(
    spec: LayerSpec,
    layer: MoELayer,
    hidden: Tensor,
    logits: Tensor,
    context: dict[str, Tensor],
    banned: Sequence[int] = (),
) -> Tensor:
    """Weights [T, C] of `layer` for its router's input hidden [T, D], logits [T, C] and context.

    Banned choices take no part: their logits and choice scores are -inf.
    """
    router = layer.router
    bias = layer.correction_bias
    if banned:
        logits = logits.index_fill(-1, torch.tensor(banned), float("-inf"))
    if banned and bias is not None:
        bias = bias.index_fill(-1, torch.tensor(banned), float("-inf"))
    extra: dict[str, Any] = {"bias": bias}
    if spec.selection == "hash":
        extra["hash_ids"] = router.tid2eid[context["input_ids"].reshape(-1)]
    if spec.normalizes_with_shared:
        extra["shared_logits"] = hidden @ layer.router_weight[spec.num_experts :].T
    if spec.has_expert_scale:
        extra["expert_scale"] = router.per_expert_scale
    if spec.score == "sparsemixer":
        extra["jitter"] = router.router_jitter_noise
    return claimed_weights(spec, logits.float(), **extra)


def _limit_to_groups(choice: Tensor, spec: LayerSpec) -> Tensor:
    grouped = choice.unflatten(-1, (spec.num_groups, -1))
    best = {"top2": grouped.topk(2).values.sum(-1), "max": grouped.amax(-1)}[spec.group_score]
    kept = torch.zeros_like(best).scatter(-1, best.topk(spec.topk_groups).indices, 1).bool()
    return grouped.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(-2)


def _sparsemixer(logits: Tensor, top_k: int, jitter: float) -> Tensor:
    # Each choice is a softmax over the experts whose logit is within 2 * jitter, relatively, of
    # the best one that is left.
    weights, left = torch.zeros_like(logits), logits
    for _ in range(top_k):
        best, expert = left.max(-1, keepdim=True)
        far = (best - logits) / logits.abs().clamp(min=best) > 2 * jitter
        share = left.masked_fill(far, float("-inf")).softmax(-1)
        weights = weights.scatter(-1, expert, share.gather(-1, expert))
        left = left.scatter(-1, expert, float("-inf"))
    return weights
