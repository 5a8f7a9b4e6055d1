"""`nllb_moe`: top-2 with capacity."""

from __future__ import annotations

from torch import nn


class NllbMoeAdapter:
    experts_name = "experts"
    router_name = "router"
    shared_names: tuple[str, ...] = ()

    @staticmethod
    def matches(block: nn.Module) -> bool:
        return {"experts", "router"} <= block._modules.keys() and hasattr(
            block.router, "route_tokens"
        )
