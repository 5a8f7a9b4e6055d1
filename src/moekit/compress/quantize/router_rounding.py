"""A router rounded to integers so that it goes on choosing the same experts.

EAQuant, arXiv 2506.13329: the range of the weights is clipped where that keeps the distribution
over the chosen experts, not the weights, nearest to what they were. Shapes: T tokens, D width,
C choices, K chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

RATIOS = tuple(0.35 + 0.65 * step / 100 for step in range(101))


@dataclass(frozen=True)
class RoundedRouter:
    """The router's matrix [C, D] after rounding, the share of its range that is kept, and the mean
    divergence of the choices in nats."""

    weight: Tensor
    ratio: float
    divergence: float


def rounded_rows(weight: Tensor, bits: int, ratio: float = 1.0) -> Tensor:
    """Each row [D] rounded to symmetric integers of `bits` bits over `ratio` of its range."""
    top = 2 ** (bits - 1) - 1
    step = (weight.abs().amax(-1, keepdim=True) * ratio / top).clamp(min=1e-12)
    return torch.round(weight / step).clamp(-top, top) * step


def choice_divergence(expected: Tensor, found: Tensor, top_k: int) -> float:
    """Mean KL divergence of softmax(`found`) from softmax(`expected`), both [T, C], over the
    `top_k` entries that `expected` chooses."""
    wanted = expected.float().log_softmax(-1)
    best = wanted.topk(top_k, dim=-1).indices
    there = found.float().log_softmax(-1)
    gap = (wanted - there).gather(-1, best)
    return float((wanted.gather(-1, best).exp() * gap).sum(-1).mean())


def align_router(
    weight: Tensor,
    inputs: Tensor,
    top_k: int,
    *,
    bias: Tensor | None = None,
    bits: int = 8,
    input_bits: int = 8,
    by: str = "divergence",
) -> RoundedRouter:
    """Round a router `weight` [C, D] over the part of its range that `by` finds best on `inputs`.

    `by` is "divergence" of the choices or "weights", their squared error. The inputs [T, D] are
    rounded to `input_bits` bits a token while the range is searched; 0 leaves them as they are.
    """
    weight = weight.float()
    given = rounded_rows(inputs, input_bits) if input_bits else inputs
    expected = functional.linear(inputs, weight, bias)

    def made(ratio: float) -> RoundedRouter:
        rounded = rounded_rows(weight, bits, ratio)
        found = functional.linear(given, rounded, bias)
        return RoundedRouter(rounded, ratio, choice_divergence(expected, found, top_k))

    scores: dict[str, Callable[[RoundedRouter], float]] = {
        "divergence": lambda router: router.divergence,
        "weights": lambda router: float((router.weight - weight).square().sum()),
    }
    # The widest of equally good ranges.
    return min((made(ratio) for ratio in reversed(RATIOS)), key=scores[by])


def agreement(expected: Tensor, found: Tensor, top_k: int) -> float:
    """The share of the `top_k` choices of logits [T, C] that other logits choose as well."""
    wanted = torch.zeros_like(expected).scatter_(1, expected.topk(top_k, dim=-1).indices, 1.0)
    return float(wanted.gather(1, found.topk(top_k, dim=-1).indices).mean())
