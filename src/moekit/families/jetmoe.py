"""`jetmoe`: tokens are sorted by expert inside the block."""

from __future__ import annotations

from torch import nn


class JetMoeAdapter:
    experts_name = ""
    router_name = "router"
    shared_names: tuple[str, ...] = ()

    @staticmethod
    def matches(block: nn.Module) -> bool:
        return {"input_linear", "output_linear", "router", "activation"} <= block._modules.keys()
