"""`llama4`: every expert sees every token, scaled by its score before the expert runs."""

from __future__ import annotations

from torch import nn


class Llama4Adapter:
    experts_name = "experts"
    router_name = "router"
    shared_names: tuple[str, ...] = ("shared_expert",)

    @staticmethod
    def matches(block: nn.Module) -> bool:
        return (
            {"experts", "router", "shared_expert"} <= block._modules.keys()
            and isinstance(block.router, nn.Linear)
            and hasattr(block.experts, "expert_dim")
        )
