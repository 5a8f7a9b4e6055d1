"""`MoELayer`: a router, a pool of experts, and what every token passes through beside them."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .context import RouterContext
from .pool import ExpertPool

JOINS = ("sum", "gate", "coefficients")


class SharedExpert(nn.Module):
    """An expert that every token passes through: the only one of `bank`.

    `join` says how its output meets that of the routed experts: "sum" with weight 1 (DeepSeekMoE,
    arXiv 2401.06066), "gate" with weight sigmoid(w x) (Qwen2-MoE), "coefficients" with two learned
    weights for both, a softmax of a linear map with a bias (residual MoE, DeepSpeed-MoE, arXiv
    2201.05596). Shapes: T tokens, D width.
    """

    def __init__(self, width: int, bank: nn.Module, *, join: str = "sum") -> None:
        super().__init__()
        self.bank: Any = bank
        self.join = join
        if join == "gate":
            self.gate = nn.Linear(width, 1, bias=False)
        elif join == "coefficients":
            self.coefficients = nn.Linear(width, 2)

    def forward(self, hidden: Tensor, routed: Tensor) -> Tensor:
        """`hidden` [T, D] through the expert, joined to the output `routed` [T, D]."""
        own = self.bank.run_one(0, hidden)
        if self.join == "gate":
            return routed + F.sigmoid(self.gate(hidden)) * own
        if self.join == "coefficients":
            share = self.coefficients(hidden).softmax(-1)
            return share[:, :1] * routed + share[:, 1:] * own
        return routed + own


class MoELayer(nn.Module):
    """What stands in a transformer block in place of the MLP: [B, S, D] to [B, S, D].

    The residual is the block's. The router's `Routing` is appended to `context.records`; without a
    context the layer stands alone, outside of training steps. A `lent` pool belongs to another
    layer, which saves and trains it.
    """

    def __init__(
        self,
        router: nn.Module,
        pool: ExpertPool,
        shared: SharedExpert | None = None,
        *,
        lent: bool = False,
    ) -> None:
        super().__init__()
        self.router: Any = router
        self.shared = shared
        if lent:
            # In a tuple, so that its parameters are not this layer's as well.
            self._lent = (pool,)
        else:
            self.pool: Any = pool

    def __getattr__(self, name: str):
        if name == "pool" and self.lent:
            return self._lent[0]
        return super().__getattr__(name)

    @property
    def lent(self) -> bool:
        """Whether the pool belongs to another layer."""
        return "_lent" in self.__dict__

    @property
    def top_k(self) -> int:
        """The largest number of experts that a token gets."""
        rule = getattr(self.router, "select", None)
        return getattr(rule, "top_k", None) or getattr(rule, "limit", self.pool.num_experts)

    @property
    def decodes(self) -> bool:
        """Whether a token may be routed alone, from a cache, as it is within its sequence."""
        return self._experts_causal and getattr(self.router, "decodes", self.router.causal)

    @property
    def causal(self) -> bool:
        return self._experts_causal and self.router.causal

    @property
    def _experts_causal(self) -> bool:
        # Experts of whole segments mix tokens, whatever the router reads.
        return all(getattr(bank, "causal", True) for bank in self.pool.banks)

    @property
    def sees_batch(self) -> bool:
        return self.router.sees_batch

    def forward(self, hidden: Tensor, context: RouterContext | None = None) -> Tensor:
        batch, length, width = hidden.shape
        if context is None:
            context = RouterContext(batch, length, training=self.training)
        context.cost = self.pool.cost(hidden.device)
        return self.mix(hidden.reshape(-1, width), context).view(batch, length, width)

    def mix(self, hidden: Tensor, context: RouterContext) -> Tensor:
        """What the experts make of `hidden` [T, D]: [T, D]."""
        return self.route(self.router, hidden, context)

    def route(self, router: nn.Module, hidden: Tensor, context: RouterContext) -> Tensor:
        """One decision of `router` about `hidden` [T, D], carried out by pool and shared expert."""
        routing = router(hidden, context)
        context.records.append(routing)
        out = self.pool(hidden, routing)
        return out if self.shared is None else self.shared(hidden, out)

    def after_step(self, counts: Tensor, round: int = 0) -> None:
        """Tell the router the pairs of each expert [E] in the last step, over all processes."""
        self.router.after_step(counts)
