"""`vitpose_backbone`: the caller names one expert an image; there is no router."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moekit.core.expert_weights import ExpertWeights
from moekit.core.layer import MoELayer


class VitPoseBackboneLayer(MoELayer):
    """An expert is one matrix, kept as `down`, for the last features of the block's output.

    Its input is the block's shared inner activation. Every token has one choice of weight 1.
    """

    router_name = None
    runs_partial_rows = True

    @classmethod
    def matches(cls, block: nn.Module) -> bool:
        return hasattr(block._modules.get("experts"), "part_features")

    def _count_experts(self) -> int:
        return self.experts.num_experts

    def _find_top_k(self) -> int:
        return 1

    def expert_views(self, e: int) -> ExpertWeights:
        expert = self.experts[e]
        return ExpertWeights(None, None, expert.weight.detach(), down_bias=expert.bias.detach())

    def run_expert(self, e: int, hidden: Tensor, weight: Tensor | None = None) -> Tensor:
        out = self.experts[e](hidden)
        return out if weight is None else out * weight

    def call_experts(self, forward: Any, args: tuple, kwargs: dict, port: Any) -> Any:
        hidden, indices = args
        flat = hidden.reshape(-1, hidden.shape[-1])
        ids = indices.expand(*hidden.shape[:2], 1).reshape(-1, 1)
        weights = torch.ones_like(ids, dtype=hidden.dtype)

        def native(h: Tensor, i: Tensor, w: Tensor) -> Tensor:
            return forward(*args) if i is ids and w is weights else pack(forward(h[None], i)[0] * w)

        def pack(out: Tensor) -> Tensor:
            return out.view(*hidden.shape[:2], -1)

        return port.dispatch(flat, ids, weights, native, pack)
