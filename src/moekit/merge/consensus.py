"""Which sign an entry gets when task vectors disagree, and what the agreeing ones add up to.

Shape letters: N task vectors, ... the entries of a block.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Consensus:
    """How signs are elected and agreeing entries combined.

    `vote`: "mass" adds the values up, "count" their signs. `zero` is the sign of an entry whose
    votes cancel: 1, or what most of the model elected (given by the caller). `mean` divides by the
    number of agreeing entries; otherwise their sum is left to the weights (mergekit).
    """

    vote: str = "mass"
    mean: bool = False

    def elect(self, values: Iterable[Tensor], zero: int = 1) -> Tensor:
        """The elected sign of each entry of N `values`, as +1 or -1 in float32."""
        total = self.total(values)
        if zero < 0:
            total = torch.where(total == 0, torch.full_like(total, -1.0), total)
        return torch.copysign(torch.ones(()), total)

    def total(self, values: Iterable[Tensor]) -> Tensor:
        """The sum of the votes, float32; a zero is a positive one."""
        total: Tensor | None = None
        for value in values:
            votes = (value.sign() if self.vote == "count" else value).float()
            total = votes + 0.0 if total is None else total.add_(votes)
        assert total is not None
        return total

    def agreeing(self, values: Tensor, elected: Tensor) -> Tensor:
        """Mask [N, ...] of the entries with the elected sign; zeros never agree."""
        return values.sign() == elected


def elected_balance(values: Iterable[Tensor], consensus: Consensus) -> int:
    """Sum over the entries of the signs that are elected where votes do not cancel."""
    return int(consensus.total(values).sign().sum(dtype=torch.float64))
