"""The slow, obviously correct way to run experts: one token and one choice at a time.

Shapes: T tokens, K choices, D width, F expert width, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moekit.core.registry import register


def run_expert(experts: Any, e: int, hidden: Tensor) -> Tensor:
    """Run expert `e` of a fused bank on hidden [n, D], without its routing weight.

    Honours how the bank says it is stored: transposed, with biases, gated or not, with a norm after
    the expert. The gate function of the module splits gate from up, interleaved or not.
    """
    return run_down(experts, e, run_up(experts, e, hidden))


def run_up(experts: Any, e: int, hidden: Tensor) -> Tensor:
    """The first half of `run_expert`: the input [n, F] of the down projection."""
    gated = getattr(experts, "has_gate", True)
    biased = getattr(experts, "has_bias", False)
    name = "gate_up_proj" if gated else "up_proj"
    out = F.linear(
        hidden,
        oriented(experts, name, e),
        getattr(experts, f"{name}_bias")[e] if biased else None,
    )
    if not gated:
        return experts.act_fn(out)
    if hasattr(experts, "_apply_gate"):
        return experts._apply_gate(out)
    gate, up = out.chunk(2, dim=-1)
    return experts.act_fn(gate) * up


def run_down(experts: Any, e: int, middle: Tensor) -> Tensor:
    """The second half of `run_expert`: from middle [n, F] to the output [n, D]."""
    biased = getattr(experts, "has_bias", False)
    out = F.linear(
        middle, oriented(experts, "down_proj", e), experts.down_proj_bias[e] if biased else None
    )
    if getattr(experts, "has_post_expert_norm", False):
        out = experts.post_expert_norm(out)
    return out


def oriented(experts: Any, name: str, e: int) -> Tensor:
    """Return one expert's matrix of a fused bank as a view [out, in]."""
    matrix = getattr(experts, name)[e]
    return matrix.T if getattr(experts, "is_transposed", False) else matrix


@register(
    "backend",
    "naive",
    title="A double loop over tokens and choices: what every other backend is tested against",
    limits="Slow.",
)
def naive_experts(experts: Any, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Compute sum_k weights[t, k] * expert(ids[t, k])(hidden[t]) of a fused bank; returns [T, D].

    Has the signature of an experts backend of transformers. Ids outside of the bank run nothing.
    """
    ids = ids.where(ids < experts.down_proj.shape[0], -1)
    return naive_combine(
        lambda e, row, weight: run_expert(experts, e, row) * weight, hidden, ids, weights
    )


def naive_combine(
    contribution: Callable[[int, Tensor, Tensor], Tensor],
    hidden: Tensor,
    ids: Tensor,
    weights: Tensor,
) -> Tensor:
    """Sum contribution(e, hidden[t], weight) over the choices of every token; returns [T, D].

    A choice of -1 runs nothing.
    """
    rows = []
    for t in range(hidden.shape[0]):
        row = hidden[t : t + 1]
        parts = []
        for k in range(ids.shape[1]):
            e = int(ids[t, k])
            if e >= 0:
                parts.append(contribution(e, row, weights[t, k]))
        rows.append(torch.stack(parts).sum(dim=0) if parts else torch.zeros_like(row))
    return torch.cat(rows).to(hidden.dtype) if rows else torch.zeros_like(hidden)
