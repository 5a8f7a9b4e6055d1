"""Which sign an entry gets when task vectors disagree, and what the agreeing ones add up to.

Shape letters: N task vectors, ... the entries of a block.
"""

from __future__ import annotations

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

    def elect(self, values: Tensor, zero: int = 1) -> Tensor:
        """The elected sign of each entry of values [N, ...], as +1 or -1 in their dtype."""
        votes = values.sign() if self.vote == "count" else values
        total = votes.sum(dim=0)
        positive = (total > 0) | ((total == 0) & (zero > 0))
        return positive.to(values.dtype) * 2 - 1

    def agreeing(self, values: Tensor, elected: Tensor) -> Tensor:
        """Mask [N, ...] of the entries with the elected sign; zeros never agree."""
        return values.sign() == elected


def elected_balance(values: Tensor, consensus: Consensus) -> int:
    """Sum over the entries of the signs that are elected where votes do not cancel."""
    votes = values.sign() if consensus.vote == "count" else values
    return int(votes.sum(dim=0).sign().sum(dtype=torch.float64))
