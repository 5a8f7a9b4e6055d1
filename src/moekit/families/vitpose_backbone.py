"""`vitpose_backbone`: the data set of an image names the expert; there is no router."""

from __future__ import annotations

from torch import nn


class VitPoseBackboneAdapter:
    experts_name = "experts"
    router_name = None
    shared_names: tuple[str, ...] = ()

    @staticmethod
    def matches(block: nn.Module) -> bool:
        return "experts" in block._modules and hasattr(block.experts, "part_features")
