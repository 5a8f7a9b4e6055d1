"""A layer that runs its experts in several rounds, one after the other (CoE, arXiv:2506.18945).

Shapes: T tokens, D width, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .context import RouterContext
from .moe import MoELayer, SharedExpert
from .pool import ExpertPool


class RouterChain(nn.Module):
    """The routers of `count` rounds: one for each, or a single one for all of them."""

    def __init__(self, routers: Iterable[nn.Module], count: int) -> None:
        super().__init__()
        self.routers = nn.ModuleList(routers)
        self.count = count

    def __getitem__(self, number: int) -> Any:
        return self.routers[number % len(self.routers)]

    @property
    def causal(self) -> bool:
        return all(router.causal for router in self.routers)

    @property
    def sees_batch(self) -> bool:
        return any(router.sees_batch for router in self.routers)

    @property
    def decodes(self) -> bool:
        return all(getattr(router, "decodes", router.causal) for router in self.routers)


class ChainLayer(MoELayer):
    """Rounds x <- x + experts(x) through one pool, each with a route of its own.

    Returns the sum of what the rounds added: the residual around the layer is the block's, and
    adding x here too would double it. A shared expert runs in every round. With `norm_width` every
    round after the first reads a root-mean-square norm of its input; the paper has none. One round
    is the plain layer, bit for bit.
    """

    router: RouterChain

    def __init__(
        self,
        router: RouterChain,
        pool: ExpertPool,
        shared: SharedExpert | None = None,
        *,
        norm_width: int | None = None,
        lent: bool = False,
    ) -> None:
        super().__init__(router, pool, shared, lent=lent)
        norms = 0 if norm_width is None else router.count - 1
        self.norms = nn.ModuleList(nn.RMSNorm(norm_width, eps=1e-6) for _ in range(norms))

    def mix(self, hidden: Tensor, context: RouterContext) -> Tensor:
        change = self.route(self.router[0], hidden, context)
        for number in range(1, self.router.count):
            context.round = number
            inputs = hidden + change
            if len(self.norms):
                inputs = self.norms[number - 1](inputs)
            change = change + self.route(self.router[number], inputs, context)
        return change

    @torch.no_grad()
    def after_step(self, counts: Tensor, round: int = 0) -> None:
        """Tell the router of `round` the pairs of each expert [E] of that round."""
        self.router[round].after_step(counts)
