"""`nllb_moe`: top-2 with capacity, as transformers runs it.

The block hands the experts the one-hot mask of each token's first choice where they expect expert
ids. So the values 0 and 1 of that mask act as ids: expert 1 runs with the weight of the first
choice and expert 0 with the weight of the second one, and no other expert ever runs (transformers
5.23). A trace shows what runs, not what the router meant.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moekit.core.expert_weights import ExpertWeights
from moekit.core.layer import MoELayer


class NllbMoeLayer(MoELayer):
    """The experts get a mask [T, E] and weights [T, E]; unused choices have id -1 and weight 0.

    `route` tells what the experts make of the router's answer, as above.
    """

    @classmethod
    def matches(cls, block: nn.Module) -> bool:
        return "experts" in block._modules and hasattr(block._modules.get("router"), "route_tokens")

    def _count_experts(self) -> int:
        return self.experts.num_experts

    def _find_top_k(self) -> int:
        return 2

    def expert_views(self, e: int) -> ExpertWeights:
        up, down = self.experts[f"expert_{e}"].fc1, self.experts[f"expert_{e}"].fc2
        biases = None, up.bias.detach(), down.bias.detach()
        return ExpertWeights(None, up.weight.detach(), down.weight.detach(), *biases)

    def run_expert(self, e: int, hidden: Tensor, weight: Tensor | None = None) -> Tensor:
        out = self.experts[f"expert_{e}"](hidden)
        if weight is None:
            return out
        # Outside of training the family scales by the share of tokens that training keeps.
        return out * weight * (1 - self.experts.moe_token_dropout)

    def read_router(self, output: Any) -> tuple[Tensor, Tensor]:
        mask, weights, _ = output
        return _selected(mask, weights)

    def call_experts(self, forward: Any, args: tuple, kwargs: dict, port: Any) -> Any:
        hidden, mask, given_weights = args
        weights, ids = _selected(mask, given_weights)

        def native(h: Tensor, i: Tensor, w: Tensor) -> Tensor:
            return forward(*args) if i is ids and w is weights else forward(h, i, w)

        return port.dispatch(hidden, ids, weights, native)


def _selected(mask: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    first = mask.bool()
    both = torch.stack(
        [weights.where(first, 0).sum(dim=-1), weights.where(~first, 0).sum(dim=-1)], dim=-1
    )
    ids = torch.tensor([1, 0], device=mask.device).expand(len(mask), 2)
    return both, ids.where(both > 0, -1)
