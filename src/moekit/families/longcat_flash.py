"""`longcat_flash`: the last choices are identity experts, which have no weights."""

from __future__ import annotations

from torch import Tensor, nn

from moekit.core.layer import MoELayer


class LongcatFlashLayer(MoELayer):
    """`num_experts` counts experts with weights; ids up to `num_choices` are identities."""

    @classmethod
    def matches(cls, block: nn.Module) -> bool:
        return "experts" in block._modules and hasattr(block.experts, "identity_expert")

    def run_expert(self, e: int, hidden: Tensor, weight: Tensor | None = None) -> Tensor:
        if e < self.num_experts:
            return super().run_expert(e, hidden, weight)
        return hidden if weight is None else hidden * weight
