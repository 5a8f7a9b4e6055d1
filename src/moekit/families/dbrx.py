"""`dbrx`: three flat matrices for all experts; the rule sits in the block."""

from __future__ import annotations

from torch import nn


class DbrxAdapter:
    experts_name = "experts"
    router_name = "router"
    shared_names: tuple[str, ...] = ()

    @staticmethod
    def matches(block: nn.Module) -> bool:
        return hasattr(block, "route_tokens_to_experts") and hasattr(block.experts.mlp, "w1")
