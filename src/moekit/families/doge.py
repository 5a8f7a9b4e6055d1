"""`doge`: product keys choose among experts of width one, stored as rows of two embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from moekit.core.expert_weights import ExpertWeights
from moekit.core.layer import MoELayer
from moekit.core.port import RouterCall
from moekit.core.routing_rule import Routing


class DogeLayer(MoELayer):
    """A choice (x, y) has the logit x + y of two halves of sqrt(E) keys each; logits are [T, C].

    The block splits the keys' scores across tokens, so `route` must get the whole forward's input.
    Experts beyond the square of the number of keys exist but are never chosen.
    """

    experts_name = ""
    router_name = "router_gate"
    shared_names = ("gate_proj", "up_proj", "down_proj")
    runs_partial_rows = True
    mixes_tokens = True

    @classmethod
    def matches(cls, block: nn.Module) -> bool:
        return {"router_gate", "down_embed", "up_embed"} <= block._modules.keys()

    def __init__(self, site: Any, position: int):
        super().__init__(site, position)
        self.num_choices = self.block.num_keys**2

    def _count_experts(self) -> int:
        return self.block.num_experts

    def expert_views(self, e: int) -> ExpertWeights:
        up, down = self.block.down_embed.weight.detach(), self.block.up_embed.weight.detach()
        return ExpertWeights(None, up[e : e + 1], down[e : e + 1].T)

    def run_expert(self, e: int, hidden: Tensor, weight: Tensor | None = None) -> Tensor:
        inner = self.block.act_fn(hidden @ self.block.down_embed.weight[e : e + 1].T)
        out = (inner if weight is None else inner * weight) @ self.block.up_embed.weight[e : e + 1]
        return out

    def _route(
        self,
        hidden: Tensor,
        context: dict[str, Any],
        edit: Callable[[Tensor], Tensor] | None,
        banned: Iterable[int] = (),
    ) -> Routing:
        logits, order = self._logits(self.block.router_gate(hidden))
        if edit is not None:
            logits = edit(logits)
        return Routing(logits, *self._choose(logits, order))

    def _logits(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits [T, C] and the order in which the family compares them."""
        x, y = keys.reshape(2, -1, self.block.num_keys)
        num_tokens = len(x)
        logits = (x.unsqueeze(-1) + y.unsqueeze(-2)).view(num_tokens, -1)
        ranks = [half.topk(self.block.num_keys, dim=-1).indices for half in (x, y)]
        order = ranks[0].unsqueeze(-1) * self.block.num_keys + ranks[1].unsqueeze(-2)
        return logits, order.view(num_tokens, -1)

    def _choose(self, logits: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        # Comparing in the family's order makes ties, common in bf16, come out the same way.
        scores, positions = logits.gather(-1, order).topk(self.top_k, dim=-1)
        weights = scores.softmax(dim=-1)
        if self.block.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights, order.gather(-1, positions)

    @property
    def router_width(self) -> int:
        return self.block.hidden_size

    def call_router(self, forward: Any, args: tuple, kwargs: dict, port: Any) -> Any:
        return forward(*args, **kwargs)

    def call_experts(self, forward: Any, args: tuple, kwargs: dict, port: Any) -> Any:
        (hidden,) = args
        flat = hidden.reshape(-1, hidden.shape[-1])
        keys = self.block.router_gate(hidden)
        logits, order = self._logits(keys)
        edited = port.edits_logits
        if edited:
            logits = port.edit(logits, flat)
        weights, ids = self._choose(logits, order)
        port.router_call = RouterCall(hidden, {}, logits, keys)

        def native(h: Tensor, i: Tensor, w: Tensor) -> Any:
            if not edited and i is ids and w is weights:
                return forward(hidden)
            return pack(self._run_chosen(h, i, w))

        def pack(out: Tensor) -> Any:
            block = self.block
            shared = block.down_proj(block.act_fn(block.gate_proj(hidden)) * block.up_proj(hidden))
            return shared + out.view(hidden.shape), keys

        return port.dispatch(flat, ids, weights, native, pack)

    def _run_chosen(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        used = ids >= 0
        # An unused choice reads a row that the token uses anyway, and counts nothing.
        ids = ids.where(used, ids.max(dim=-1, keepdim=True).values.clamp(min=0))
        inner = torch.einsum("tkd,td->tk", self.block.down_embed(ids), hidden)
        inner = self.block.act_fn(inner) * weights.where(used, 0)
        return torch.einsum("tk,tkd->td", inner, self.block.up_embed(ids))
