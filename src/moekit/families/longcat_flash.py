"""`longcat_flash`: some choices are identity experts without weights."""

from __future__ import annotations

from torch import nn


class LongcatFlashAdapter:
    experts_name = "experts"
    router_name = "router"
    shared_names: tuple[str, ...] = ()

    @staticmethod
    def matches(block: nn.Module) -> bool:
        return "experts" in block._modules and hasattr(block.experts, "identity_expert")
