"""`doge`: product keys choose among experts of width one that are rows of two embeddings."""

from __future__ import annotations

from torch import nn


class DogeAdapter:
    experts_name = ""
    router_name = "router_gate"
    shared_names: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")

    @staticmethod
    def matches(block: nn.Module) -> bool:
        return {"router_gate", "down_embed", "up_embed"} <= block._modules.keys()
