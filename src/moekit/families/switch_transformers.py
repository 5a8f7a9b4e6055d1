"""`switch_transformers`: one expert a token, up to a capacity; tokens beyond it are dropped."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from moekit.core.expert_weights import ExpertWeights
from moekit.core.layer import MoELayer


class SwitchTransformersLayer(MoELayer):
    """The experts get a one-hot dispatch mask [T, K, E]; a dropped token has id -1 and weight 0.

    Capacity counts along a sequence, so `route` should get whole sequences [B, S, D].
    """

    runs_partial_rows = True

    @classmethod
    def matches(cls, block: nn.Module) -> bool:
        return (
            {"experts", "router"} <= block._modules.keys()
            and isinstance(block.experts, nn.ModuleDict)
            and not hasattr(block.router, "route_tokens")
        )

    def _count_experts(self) -> int:
        return self.experts.num_experts

    def _find_top_k(self) -> int:
        return 1

    def expert_views(self, e: int) -> ExpertWeights:
        expert = self.experts[f"expert_{e}"]
        return ExpertWeights(None, expert.wi.weight.detach(), expert.wo.weight.detach())

    def run_expert(self, e: int, hidden: Tensor, weight: Tensor | None = None) -> Tensor:
        out = self.experts[f"expert_{e}"](hidden)
        return out if weight is None else out * weight

    def read_router(self, output: Any) -> tuple[Tensor, Tensor]:
        dispatch, weights, _ = output
        return _selected(dispatch.reshape(-1, 1, self.num_experts), weights.reshape(-1, 1))

    def call_experts(self, forward: Any, args: tuple, kwargs: dict, port: Any) -> Any:
        hidden, dispatch, given_weights = args
        weights, ids = _selected(dispatch, given_weights)

        def native(h: Tensor, i: Tensor, w: Tensor) -> Tensor:
            if i is ids and w is weights:
                return forward(*args)
            used = (i >= 0).unsqueeze(-1)
            return forward(h, F.one_hot(i.clamp(min=0), self.num_experts) * used, w)

        return port.dispatch(hidden, ids, weights, native)


def _selected(dispatch: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    dropped = dispatch.sum(dim=-1) == 0
    ids = dispatch.argmax(dim=-1).masked_fill(dropped, -1)
    return weights.masked_fill(dropped, 0), ids
