"""A mask by task that splits a block's stream into a common and an own path.

Switch-DiT, arXiv 2403.09176: the task is a timestep, and routing reads its embedding alone.

Shapes: B samples, S positions, D width, E experts of a block, K chosen, L blocks, n timesteps,
U = L * E units.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moekit.core.errors import UserError
from moekit.core.registry import register
from moekit.ops.align import match

from .context import RouterContext
from .experts.linear import LinearExperts
from .route_table import RouteTable, precompute
from .routers.keyed import timestep_router


class TaskMask(nn.Module):
    """m = 1 + sum over K chosen linear experts of weight * (W c + b), for a task's embedding c.

    A block F then runs as F(x m) + (1 - m) x. The experts start at zero, so m at 1 and the block as
    it was.
    """

    def __init__(self, width: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise UserError(f"top_k {top_k} is not between 1 and the {num_experts} experts")
        self.router = timestep_router(width, num_experts, top_k)
        self.experts = LinearExperts(width, num_experts)

    def mask(self, key: Tensor, context: RouterContext | None = None) -> Tensor:
        """m [B, D] for embeddings `key` [B, D]; the routing is appended to `context.records`."""
        if context is None:
            context = RouterContext(len(key), 1, training=self.training)
        routing = self.router(key, context)
        context.records.append(routing)
        return 1 + self.experts(key, routing.pairs)

    def forward(
        self,
        block: Callable[[Tensor], Tensor],
        hidden: Tensor,
        key: Tensor,
        context: RouterContext | None = None,
    ) -> Tensor:
        """`hidden` [B, S, D] through `block`, split by the mask for `key` [B, D]."""
        mask = self.mask(key, context)[:, None, :]
        return block(hidden * mask) + (1 - mask) * hidden

    def gates(self, keys: Tensor) -> Tensor:
        """Router probabilities for all timesteps' embeddings `keys` [n, D]: [n, E]."""
        context = RouterContext(len(keys), 1, training=self.training)
        scores = self.router(keys, context).scores
        assert scores is not None
        return scores

    @torch.no_grad()
    def table(self, keys: Tensor) -> tuple[RouteTable, Tensor]:
        """Routes and masks [n, D] of all timesteps, computed once: tokens change neither."""
        routes = precompute(self.router, keys)
        return routes, 1 + self.experts(keys, routes.routing.pairs)


def prior_map(timesteps: int, units: int, share: float, power: float = 4.0) -> Tensor:
    """Which units each timestep should use: 0 or 1, [n, U].

    A window of int(U * `share`) neighbouring units begins at round((t / n)^`power` * the rest), so
    that near timesteps overlap much and far ones little. `share` is K / E. Raises UserError for an
    empty window.
    """
    window = int(units * share)
    if window < 1:
        raise UserError(f"a share {share} of {units} units is no unit at all")
    progress = torch.arange(timesteps, dtype=torch.float64) / timesteps
    start = (progress**power * (units - window)).round()[:, None]
    place = torch.arange(units)
    return ((place >= start) & (place < start + window)).float()


@torch.no_grad()
def matched_prior(
    gates: Tensor, prior: Tensor, top_k: int, generator: torch.Generator | None = None
) -> Tensor:
    """`prior` [n, U] with its columns in the order that suits `gates` [n, L, E] best.

    Best: least sum of differences (L1) between the columns of the hard top-k of the gates and those
    of the prior, by linear assignment; with a `generator` ties break by chance.
    """
    chosen = torch.zeros_like(gates).scatter(-1, gates.topk(top_k, -1).indices, 1.0).flatten(1)
    prior = prior.to(chosen)
    if generator is not None:
        prior = prior[:, torch.randperm(prior.shape[1], generator=generator).to(prior.device)]
    # Columns are 0 or 1, so their distance is a sum of products.
    distance = chosen.T @ (1 - prior) + (1 - chosen).T @ prior
    return prior[:, match(-distance).to(prior.device)]


@register(
    "balance",
    "diffusion-prior",
    title="Which experts a timestep shares with which others follows a prior",
    paper="Switch-DiT, arXiv:2403.09176",
    needs=("training",),
    limits="Of the gates of all timesteps and blocks; see TaskMask.gates.",
    options={"top_k": "experts a timestep and block", "power": "of the prior's window: 4"},
)
def diffusion_prior_loss(
    gates: Tensor,
    *,
    top_k: int,
    power: float = 4.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Mean over timesteps of the Jensen-Shannon divergence of `gates` [n, L, E] from their prior.

    In nats: 0 where gates equal the matched prior, at most log 2.
    """
    prior = prior_map(gates.shape[0], gates[0].numel(), top_k / gates.shape[-1], power)
    wanted = matched_prior(gates, prior, top_k, generator)
    found = gates.flatten(1) / gates.flatten(1).sum(1, keepdim=True)
    wanted = wanted / wanted.sum(1, keepdim=True)
    middle = (found + wanted) / 2
    return (_divergence(found, middle) + _divergence(wanted, middle)).mean() / 2


def _divergence(one: Tensor, other: Tensor) -> Tensor:
    """Kullback-Leibler divergence of rows [n, U], in nats; terms where `one` is 0 are 0."""
    return (torch.xlogy(one, one) - torch.xlogy(one, other.clamp_min(1e-30))).sum(1)
