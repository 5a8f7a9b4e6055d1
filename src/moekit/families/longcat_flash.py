"""`longcat_flash`: the last choices are identity experts, which have no weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moekit.core.layer import MoELayer

if TYPE_CHECKING:
    from moekit.core.port import LayerPort


class LongcatFlashLayer(MoELayer):
    """`num_experts` counts experts with weights; ids up to `num_choices` are identities."""

    @classmethod
    def matches(cls, block: nn.Module) -> bool:
        return "experts" in block._modules and hasattr(block.experts, "identity_expert")

    def run_expert(self, e: int, hidden: Tensor, weight: Tensor | None = None) -> Tensor:
        if e < self.num_experts:
            return super().run_expert(e, hidden, weight)
        return hidden if weight is None else hidden * weight

    def call_experts(
        self, forward: Callable[..., Any], args: tuple, kwargs: dict, port: LayerPort
    ) -> Any:
        def native(hidden: Tensor, ids: Tensor, weights: Tensor) -> Any:
            if ids.shape[1] == 1:
                # The family's loop loses the dimension of a single choice; an identity that counts
                # nothing keeps it.
                ids = torch.cat([ids, torch.full_like(ids, self.num_choices - 1)], dim=1)
                weights = torch.cat([weights, torch.zeros_like(weights)], dim=1)
            return forward(hidden, ids, weights)

        return super().call_experts(native, args, kwargs, port)
