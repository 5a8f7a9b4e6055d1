"""`ExpertPool`: the experts of a layer, in banks of one type each.

A bank is a module with

- `num_experts` and `cost`, the multiply-adds of one row in one expert (0: free);
- `forward(hidden [T, D], pairs) -> [T, D]`: the sum over pairs of weight * expert(hidden[token]),
  with `pairs.expert` counted from the bank's first;
- `run_one(expert, rows [n, D]) -> [n, D]`: one expert, plainly, without its weight; what `forward`
  is tested against;
- where pairs alone do not say all, `run_routing(hidden, routing) -> [T, D]` is called in place of
  `forward`; such a bank is the only one of its pool.

`compute.run_sorted` makes `forward` of a function on rows sorted by expert. To add a type, register
a factory `(width, count, *, options...) -> bank` of kind "expert" in a module of its own in
`moekit/layers/experts/`.

Shapes: T tokens, D width, E experts of all banks together.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from moekit.core.errors import UserError

from .routing import Pairs, Routing


class ExpertPool(nn.Module):
    """The banks' experts under one numbering: the first bank's come first."""

    banks: Any

    def __init__(self, banks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.banks = nn.ModuleList(banks)
        if len(self.banks) > 1 and any(hasattr(bank, "run_routing") for bank in self.banks):
            raise UserError("composed experts must be the only bank of their pool")

    @property
    def num_experts(self) -> int:
        return sum(bank.num_experts for bank in self.banks)

    def cost(self, device: torch.device | str = "cpu") -> Tensor:
        """Multiply-adds of a row in every expert: float32 [E]."""
        costs = [float(bank.cost) for bank in self.banks for _ in range(bank.num_experts)]
        return torch.tensor(costs, device=device)

    def forward(self, hidden: Tensor, routing: Routing) -> Tensor:
        """The sum over pairs of weight * expert(hidden[token]): [T, D]."""
        if len(self.banks) == 1:
            bank = self.banks[0]
            if hasattr(bank, "run_routing"):
                return bank.run_routing(hidden, routing)
            return bank(hidden, routing.pairs)
        out, first = torch.zeros_like(hidden), 0
        for bank in self.banks:
            own = (routing.expert >= first) & (routing.expert < first + bank.num_experts)
            pairs = Pairs(routing.token[own], routing.expert[own] - first, routing.weight[own])
            out = out + bank(hidden, pairs)
            first += bank.num_experts
        return out

    def run_one(self, expert: int, rows: Tensor) -> Tensor:
        """Expert `expert` on `rows` [n, D], without its weight."""
        for bank in self.banks:
            if expert < bank.num_experts:
                return bank.run_one(expert, rows)
            expert -= bank.num_experts
        raise IndexError(f"the pool has {self.num_experts} experts")
