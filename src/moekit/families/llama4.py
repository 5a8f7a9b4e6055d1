"""`llama4`: every expert sees every token, scaled by the token's score before the expert runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moekit.core.expert_weights import ExpertWeights
from moekit.core.layer import MoELayer


class Llama4Layer(MoELayer):
    """The weight of a choice multiplies the expert's input, and is 0 for experts not chosen."""

    shared_names = ("shared_expert",)
    runs_partial_rows = True

    @classmethod
    def matches(cls, block: nn.Module) -> bool:
        children = block._modules
        return isinstance(children.get("router"), nn.Linear) and hasattr(
            children.get("experts"), "expert_dim"
        )

    def expert_views(self, e: int) -> ExpertWeights:
        gate, up = self.experts.gate_up_proj[e].detach().T.chunk(2, dim=0)
        return ExpertWeights(gate, up, self.experts.down_proj[e].detach().T)

    def run_expert(self, e: int, hidden: Tensor, weight: Tensor | None = None) -> Tensor:
        if weight is not None:
            hidden = hidden * weight
        gate, up = (hidden @ self.experts.gate_up_proj[e]).chunk(2, dim=-1)
        return (up * self.experts.act_fn(gate)) @ self.experts.down_proj[e]

    def read_router(self, output: Any) -> tuple[Tensor, Tensor]:
        scores, logits = output
        ids = logits.topk(self.top_k, dim=1).indices
        return scores.gather(1, ids), ids

    def call_experts(self, forward: Any, args: tuple, kwargs: dict, port: Any) -> Any:
        hidden = port.router_call.hidden
        weights, ids = self.read_router(port.router_call.output)

        def native(h: Tensor, i: Tensor, w: Tensor) -> Tensor:
            if i is ids and w is weights:
                return forward(*args)
            scores = h.new_zeros(len(h), self.num_experts)
            scores = scores.scatter_add(1, i.clamp(min=0), w.masked_fill(i < 0, 0).to(h.dtype))
            return forward(h.repeat(self.num_experts, 1) * scores.T.reshape(-1, 1))

        def pack(out: Tensor) -> Tensor:
            # The block adds up what the E experts return, so one of them may hold the whole sum.
            rest = out.new_zeros((self.num_experts - 1) * len(out), out.shape[1])
            return torch.cat([out, rest])

        return port.dispatch(hidden, ids, weights, native, pack)
