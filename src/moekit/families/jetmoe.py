"""`jetmoe`: the block sorts tokens by expert. Its attention experts are not a MoE layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moekit.core.expert_weights import ExpertWeights
from moekit.core.layer import MoELayer


class JetMoeLayer(MoELayer):
    """The block itself is the experts module; it adds a bias [D] to the routed sum."""

    experts_name = ""
    runs_partial_rows = True

    @classmethod
    def matches(cls, block: nn.Module) -> bool:
        # The mixture of attention heads has the same parts, but no activation between them.
        return {"input_linear", "output_linear", "router", "activation"} <= block._modules.keys()

    def _count_experts(self) -> int:
        return self.block.input_linear.num_experts

    def expert_views(self, e: int) -> ExpertWeights:
        gate, up = self.block.input_linear.weight[e].detach().chunk(2, dim=0)
        return ExpertWeights(gate, up, self.block.output_linear.weight[e].detach())

    def run_expert(self, e: int, hidden: Tensor, weight: Tensor | None = None) -> Tensor:
        gate, up = (hidden @ self.block.input_linear.weight[e].T).chunk(2, dim=-1)
        out = (self.block.activation(gate) * up) @ self.block.output_linear.weight[e].T
        return out if weight is None else out * weight

    def read_router(self, output: Any) -> tuple[Tensor, Tensor]:
        order, _, sorted_weights, counts, _ = output
        experts = torch.arange(self.num_experts, device=order.device)
        ids = torch.empty_like(order)
        ids[order] = experts.repeat_interleave(torch.tensor(counts, device=order.device))
        weights = torch.empty_like(sorted_weights).index_put((order,), sorted_weights)
        return weights.view(-1, self.top_k), ids.view(-1, self.top_k)

    def _sorted(self, ids: Tensor, weights: Tensor, logits: Tensor) -> tuple:
        flat = ids.flatten()
        order = flat.sort().indices
        order = order[flat[order] >= 0]
        counts = flat[order].bincount(minlength=self.num_experts).tolist()
        token = order.div(ids.shape[1], rounding_mode="trunc")
        return order, token, weights.flatten()[order], counts, logits

    def call_experts(self, forward: Any, args: tuple, kwargs: dict, port: Any) -> Any:
        (hidden,) = args
        flat = hidden.reshape(-1, hidden.shape[-1])
        output = self.block.router(flat)
        weights, ids = self.read_router(output)

        def native(_: Tensor, i: Tensor, w: Tensor) -> Tensor:
            same = i is ids and w is weights
            port.router_output = output if same else self._sorted(i, w, output[-1])
            try:
                return forward(hidden)
            finally:
                port.router_output = None

        def pack(out: Tensor) -> Tensor:
            return (out + self.block.bias).view(hidden.shape)

        return port.dispatch(flat, ids, weights, native, pack)
