"""`switch_transformers`: top-1 with capacity."""

from __future__ import annotations

from torch import nn


class SwitchTransformersAdapter:
    experts_name = "experts"
    router_name = "router"
    shared_names: tuple[str, ...] = ()

    @staticmethod
    def matches(block: nn.Module) -> bool:
        return (
            {"experts", "router"} <= block._modules.keys()
            and isinstance(block.experts, nn.ModuleDict)
            and not hasattr(block.router, "route_tokens")
        )
