"""What losses read of a `Routing`: probabilities, loads, and its parts by sequence.

Shapes: T tokens, U units, E experts, N pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from moekit.core.errors import UserError

from ..routing import Routing

Loss = TypeVar("Loss", bound=Callable[..., Tensor])


def at_balance(value: Callable[[int, int], float]) -> Callable[[Loss], Loss]:
    """Declare a loss's value at perfect balance, by the number of experts and of choices a token.

    Perfect balance: every expert has as many pairs as any other, and a token's probability lies on
    its chosen experts in equal parts. A loss that this does not determine declares nothing.
    """

    def declare(loss: Loss) -> Loss:
        loss.at_balance = value  # type: ignore[attr-defined]
        return loss

    return declare


def probabilities(routing: Routing) -> Tensor:
    """The router's probabilities over all experts, of units that are not padding: float32 [., E].

    A softmax's own output, sigmoid scores over their sum (DeepSeek-V3, arXiv 2412.19437), and where
    scores are not made from logits, or may be negative, the softmax of the logits. UserError for
    a router that has neither.
    """
    scores, logits = routing.scores, routing.logits
    if scores is None or scores is logits:
        if logits is None:
            raise UserError("this router has no scores; a loss on probabilities cannot act on it")
        made = logits.float().softmax(-1)
    else:
        positive = scores.float()
        made = positive / positive.sum(-1, keepdim=True).clamp_min(1e-20)
    return real_units(routing, made)


def router_logits(routing: Routing) -> Tensor:
    """Logits of units that are not padding, float32 [., E]; UserError where there are none."""
    if routing.logits is None:
        raise UserError("this router has no logits; a loss on logits cannot act on it")
    return real_units(routing, routing.logits.float())


def real_units(routing: Routing, values: Tensor) -> Tensor:
    """The rows of `values` [U, ...] that are not padding."""
    mask = routing.unit_mask()
    return values if mask is None else values[mask]


def mean_of(values: Tensor) -> Tensor:
    """The mean over rows [., ...]; zero, with a gradient of zero, where there are none."""
    return values.sum(0) / max(1, values.shape[0])


def load_share(routing: Routing) -> Tensor:
    """The share of pairs that wanted each expert, before any was dropped: [E], no gradient."""
    return share_of(routing.wanted())


def share_of(counts: Tensor) -> Tensor:
    """`counts` [..., E] over their sum; zero where there is nothing."""
    return counts / counts.sum(-1, keepdim=True).clamp_min(1)


def by_sequence(routing: Routing, batch: int) -> list[Routing]:
    """The routing of each of `batch` equal sequences as a record of its own."""
    length = routing.num_tokens // batch
    if routing.unit_of_token is not None:
        place = torch.arange(routing.num_tokens, device=routing.token.device) // length
        mask = routing.token_mask
        own = [place == i for i in range(batch)]
        return [replace(routing, token_mask=o if mask is None else o & mask) for o in own]
    starts = torch.arange(batch + 1, device=routing.token.device) * length
    cuts = torch.searchsorted(routing.token, starts).tolist()
    return [_window(routing, i * length, length, cuts[i], cuts[i + 1]) for i in range(batch)]


def _window(routing: Routing, begin: int, length: int, first: int, last: int) -> Routing:
    """Tokens `begin` to `begin + length`, whose pairs are `first` to `last`."""
    rows, dropped = slice(begin, begin + length), routing.dropped
    if dropped is not None:
        inside = (dropped[:, 0] >= begin) & (dropped[:, 0] < begin + length)
        dropped = dropped[inside] - dropped.new_tensor([begin, 0])

    def cut(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[rows]

    same = routing.scores is routing.logits
    logits = cut(routing.logits)
    return replace(
        routing,
        token=routing.token[first:last] - begin,
        expert=routing.expert[first:last],
        weight=routing.weight[first:last],
        num_tokens=length,
        logits=logits,
        scores=logits if same else cut(routing.scores),
        dropped=dropped,
        token_mask=cut(routing.token_mask),
    )
