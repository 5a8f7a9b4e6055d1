"""Dynamic expert sharing: all tokens of a decoding step choose among one small set of experts.

Lossy, and off unless asked for. Shapes: N tokens, E experts (C choices), K chosen.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from moekit.core.errors import UserError
from moekit.core.layer import MoELayer
from moekit.core.method_text import parse_method
from moekit.core.registry import Option, register_preset, registry


def shared_by_sequence(logits: Tensor, per_token: int) -> Tensor:
    """The union of every token's `per_token` best experts, a mask [E] over `logits` [N, E]."""
    best = logits.topk(min(per_token, logits.shape[1]), dim=-1).indices
    return torch.zeros(logits.shape[1], dtype=torch.bool).index_fill_(0, best.reshape(-1), True)


def shared_by_vote(logits: Tensor, top_k: int, size: int) -> Tensor:
    """The `size` experts of the most router weight, a mask [E]; each token votes with the weights
    of its `top_k` best in `logits` [N, E]."""
    weights = logits.float().softmax(-1)
    best = weights.topk(min(top_k, weights.shape[1]), dim=-1)
    votes = torch.zeros(weights.shape[1]).index_add_(
        0, best.indices.reshape(-1), best.values.reshape(-1)
    )
    chosen = votes.topk(min(size, len(votes))).indices
    return torch.zeros(len(votes), dtype=torch.bool).index_fill_(0, chosen, True)


class SharedExperts:
    """Chooses the set; of a model in torch also a transform of router logits, for
    `view.transform_routing(..., on="logits")`.

    By "sequence" the set is the union of each token's `per_token` best experts, by "vote" the
    `share` of all experts with the most weight; never fewer than K. Every token then chooses its K
    within the set by the family's own rule. Passes of one token and of more than `max_tokens`,
    which are prompts, stay as they are.
    """

    def __init__(
        self,
        *,
        by: Literal["sequence", "vote"] = "vote",
        per_token: int = 3,
        share: float = 0.5,
        max_tokens: int = 64,
    ) -> None:
        if per_token < 1 or not 0 < share <= 1:
            raise UserError(f"per_token {per_token} must be 1 or more, share {share} in (0, 1]")
        self.by, self.per_token, self.share, self.max_tokens = by, per_token, share, max_tokens

    def applies(self, tokens: int) -> bool:
        """Whether a pass of so many tokens shares experts."""
        return 1 < tokens <= self.max_tokens

    def __call__(self, layer: MoELayer, logits: Tensor, hidden: Tensor) -> Tensor:
        """Logits [N, C] with minus infinity outside the set.

        Raises UserError for a family with a correction bias, which could still choose those.
        """
        if not self.applies(len(logits)):
            return logits
        if layer.correction_bias is not None:
            raise UserError(
                f"expert sharing works on logits alone; {layer.name} also chooses by a correction "
                "bias"
            )
        outside = ~self.chosen(logits.detach().cpu(), layer.top_k).to(logits.device)
        return logits.masked_fill(outside, float("-inf"))

    def chosen(self, logits: Tensor, top_k: int) -> Tensor:
        """The set as a mask [C]."""
        count = logits.shape[1]
        if self.by == "vote":
            size = max(math.ceil(self.share * count), top_k)
            return shared_by_vote(logits, top_k, size)
        found = shared_by_sequence(logits, self.per_token)
        if int(found.sum()) < top_k:
            # Fewer than K would leave places to fill with experts outside the set.
            found |= shared_by_vote(logits, top_k, top_k)
        return found


_LIMITS = (
    "Changes the output. Needs the native runner, which runs sequences together; not for families "
    "with a correction bias or groups of experts."
)
_LONGEST = Option("max_tokens", "int", "passes of more tokens are prompts and share nothing", 64)
register_preset(
    SharedExperts,
    "des-seq",
    kind="scheduler",
    title="Tokens decoded together share the union of their best few experts",
    paper="DES 2602.00879",
    lossless=False,
    limits=_LIMITS,
    settings={"by": "sequence"},
    options=(Option("per_token", "int", "best experts of each token that are shared", 3), _LONGEST),
)
register_preset(
    SharedExperts,
    "des-vote",
    kind="scheduler",
    title="Tokens decoded together share the experts that they vote for",
    paper="DES 2602.00879",
    lossless=False,
    limits=_LIMITS,
    settings={"by": "vote"},
    options=(Option("share", "float", "of all experts that are chosen from", 0.5), _LONGEST),
)


def shared_experts(text: str) -> SharedExperts:
    """Expert sharing by name, as "des-vote" or with options, "des-vote:share=0.2".

    Raises UserError for an unknown name or option.
    """
    name, options = parse_method(text)
    build = registry.find(name, kind="scheduler").load()
    if getattr(build, "func", None) is not SharedExperts:
        raise UserError(f"{name} shares no experts: des-seq and des-vote do")
    try:
        return build(**options)
    except TypeError as error:
        raise UserError(f"{name}: {error}") from None
