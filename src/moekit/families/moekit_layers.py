"""moekit's own layers (`model_type: moekit`), where the experts are one bank with gates."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from moekit.core.layer import MoELayer
from moekit.core.routing_rule import Routing


class MoekitLayer(MoELayer):
    """The experts get ragged pairs; as ids [T, K] a token with fewer has -1 and weight 0.

    Layers of several banks, of experts without gates, in several rounds, or on a pool that another
    layer owns are not seen.
    """

    experts_name = "pool.banks.0"
    shared_names = ("shared",)
    runs_partial_rows = True

    @classmethod
    def matches(cls, block: nn.Module) -> bool:
        banks = getattr(block._modules.get("pool"), "banks", None)
        return (
            type(block).__name__ == "MoELayer"
            and {"router", "pool"} <= block._modules.keys()
            and isinstance(banks, nn.ModuleList)
            and len(banks) == 1
            and {"gate_up_proj", "down_proj"} == banks[0]._parameters.keys()
        )

    @property
    def mixes_tokens(self) -> bool:  # type: ignore[override]
        return not self.block.decodes

    def run_expert(self, e: int, hidden: Tensor, weight: Tensor | None = None) -> Tensor:
        out = self.experts.run_one(e, hidden)
        return out if weight is None else out * weight

    def read_router(self, output: Any) -> tuple[Tensor, Tensor]:
        return self._dense(output.pairs, output.num_tokens)

    def _dense(self, pairs: Any, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Weights and ids [T, K] of pairs that are sorted by token."""
        token, expert, weight = pairs
        per_token = torch.bincount(token, minlength=num_tokens)
        place = torch.arange(len(token), device=token.device)
        rank = place - (per_token.cumsum(0) - per_token)[token]
        shape = (num_tokens, self.top_k)
        ids, weights = token.new_full(shape, -1), weight.new_zeros(shape)
        return weights.index_put((token, rank), weight), ids.index_put((token, rank), expert)

    def call_experts(self, forward: Any, args: tuple, kwargs: dict, port: Any) -> Any:
        hidden, pairs = args
        weights, ids = self._dense(pairs, len(hidden))

        def native(h: Tensor, i: Tensor, w: Tensor) -> Tensor:
            if i is ids and w is weights:
                return forward(h, pairs)
            token, place = (i >= 0).nonzero(as_tuple=True)
            return forward(h, type(pairs)(token, i[token, place], w[token, place]))

        return port.dispatch(hidden, ids, weights, native)

    def _route(
        self, hidden: Tensor, context: dict[str, Any], edit: Any, banned: Iterable[int] = ()
    ) -> Routing:
        from moekit.layers.context import RouterContext

        batch, length = hidden.shape[:2] if hidden.dim() == 3 else (1, len(hidden))
        if "context" not in context:
            cost = self.block.pool.cost(hidden.device)
            context = {"context": RouterContext(batch, length, layer=self.index, cost=cost)}
        return super()._route(hidden.reshape(batch * length, -1), context, edit, banned)
