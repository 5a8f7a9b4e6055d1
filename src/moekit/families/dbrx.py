"""`dbrx`: one flat matrix a role for all experts, and a routing rule that sits in the block."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from moekit.core.expert_weights import ExpertWeights
from moekit.core.layer import MoELayer


class DbrxLayer(MoELayer):
    """Experts are row blocks of `w1`, `v1`, `w2` [E * F, D]; they are called with [B, S, D]."""

    @classmethod
    def matches(cls, block: nn.Module) -> bool:
        return hasattr(block, "route_tokens_to_experts")

    def _count_experts(self) -> int:
        return self.experts.num_experts

    def _rows(self, name: str, e: int) -> Tensor:
        width = self.experts.ffn_hidden_size
        return getattr(self.experts.mlp, name)[e * width : (e + 1) * width]

    def expert_views(self, e: int) -> ExpertWeights:
        gate, up, down = (self._rows(name, e).detach() for name in ("w1", "v1", "w2"))
        return ExpertWeights(gate, up, down.T)

    def run_expert(self, e: int, hidden: Tensor, weight: Tensor | None = None) -> Tensor:
        out = self.experts.mlp(hidden, *(self._rows(name, e) for name in ("w1", "v1", "w2")))
        return out if weight is None else out * weight

    def read_router(self, output: Any) -> tuple[Tensor, Tensor]:
        return self.block.route_tokens_to_experts(output)

    def call_experts(self, forward: Any, args: tuple, kwargs: dict, port: Any) -> Any:
        hidden, ids, weights = args
        flat = hidden.reshape(-1, hidden.shape[-1])
        out = port.dispatch(flat, ids, weights, lambda h, i, w: forward(h[None], i, w)[0])
        return out.view(hidden.shape)
