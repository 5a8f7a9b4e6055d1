"""Routed low-rank residues: y = sum over experts of gate_e * B_e A_e x, all in two products.

The factors of all experts lie behind one another; `expert_of` says whose each rank is, so experts
may differ in rank. This is the kernel of Twin-Merging (2406.15479) and of every adapter mixture.

Shapes: ... leading dimensions, I inputs, O outputs, R ranks of all experts together, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor


def routed_low_rank(
    x: Tensor, right: Tensor, left: Tensor, expert_of: Tensor, gates: Tensor
) -> Tensor:
    """The gated sum [..., O] for x [..., I], right [R, I], left [O, R] and gates [..., E].

    `expert_of` [R] is the expert of each rank. Leading dimensions of `gates` may be 1.
    """
    inner = torch.nn.functional.linear(x, right) * gates.to(x.dtype)[..., expert_of]
    return torch.nn.functional.linear(inner, left)


def routed_low_rank_naive(
    x: Tensor, right: Tensor, left: Tensor, expert_of: Tensor, gates: Tensor
) -> Tensor:
    """`routed_low_rank` expert by expert, with every matrix written out."""
    total = x.new_zeros(*x.shape[:-1], left.shape[0])
    for expert in range(gates.shape[-1]):
        mine = expert_of == expert
        matrix = left[:, mine] @ right[mine]
        total = total + gates[..., expert, None] * torch.nn.functional.linear(x, matrix)
    return total
