"""A learned permutation of the experts behind any router (local search of COMET, KDD 2023).

Experts are reassigned to the slots of a router, which lets it escape a bad start.

Letters: T tokens, E experts, D width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from moekit.core.errors import UserError
from moekit.core.registry import register
from moekit.ops.align import match
from moekit.ops.sinkhorn import sinkhorn

from ..build import build_router
from ..context import RouterContext
from ..routing import Routing
from ..select import ragged_choice

PERMUTATION = "permutation"
_ENTROPY_EPS = 1e-6


class LocalSearch(nn.Module):
    """`router` with weights g [T, E] replaced by g P, renormalised to the sum they had.

    P is, in the first `steps` steps of training, the Sinkhorn projection of `slots` [E, E] / tau to
    a doubly stochastic matrix, tau falling from `hot` to `cold` (log-linear) and the iterations
    growing from `few` to `many`; afterwards, and outside of training, the permutation that
    `slots` assigns best (Hungarian).
    """

    def __init__(
        self,
        router: nn.Module,
        num_experts: int,
        steps: int,
        *,
        hot: float = 1e-3,
        cold: float = 1e-7,
        few: int = 20,
        many: int = 150,
    ) -> None:
        super().__init__()
        self.router: Any = router
        self.steps = steps
        self.hot, self.cold, self.few, self.many = hot, cold, few, many
        self.slots = nn.Parameter(torch.empty(num_experts, num_experts))
        self.init_weights_with(hot)

    def init_weights_with(self, std: float) -> None:
        # Of the size of the first temperature: the search starts undecided.
        nn.init.normal_(self.slots, std=self.hot)

    @property
    def causal(self) -> bool:
        return self.router.causal

    @property
    def sees_batch(self) -> bool:
        return self.router.sees_batch

    @property
    def select(self) -> Any:
        """The rule of selection of the router inside, of which others read the experts a token."""
        return getattr(self.router, "select", None)

    def soft_permutation(self, step: int) -> Tensor:
        """P [E, E] at `step` of the search: slots in rows, experts in columns."""
        progress = min(1.0, step / max(1, self.steps))
        tau = self.hot * (self.cold / self.hot) ** progress
        iterations = round(self.few + (self.many - self.few) * progress)
        return sinkhorn(self.slots.float(), tau, iterations=iterations).plan

    @torch.no_grad()
    def expert_of_slot(self) -> Tensor:
        """The expert of each slot, int64 [E]."""
        return match(self.slots.float()).to(self.slots.device)

    def forward(self, hidden: Tensor, context: RouterContext) -> Routing:
        """The routing of `hidden` [T, D]: ragged and nearly dense while the search goes on."""
        routing = self.router(hidden, context)
        if context.training and context.step < self.steps:
            return self._softly(routing, context.step)
        moved = self.expert_of_slot()
        back = moved.argsort()
        logits = None if routing.logits is None else routing.logits[:, back]
        scores = None if routing.scores is None else routing.scores[:, back]
        return replace(
            routing,
            expert=moved[routing.expert],
            dropped=_moved_drops(routing, moved),
            logits=logits,
            # Losses tell by this that scores are no probabilities.
            scores=logits if routing.scores is routing.logits else scores,
        )

    def _softly(self, routing: Routing, step: int) -> Routing:
        permutation = self.soft_permutation(step)
        shape = (routing.num_tokens, routing.num_experts)
        weights = routing.weight.new_zeros(shape).index_put(
            (routing.token, routing.expert), routing.weight
        )
        mixed = weights @ permutation
        unit, expert, _ = ragged_choice(mixed != 0, mixed)
        scores = routing.scores
        if scores is not None and scores is routing.logits:
            scores = scores.softmax(-1)
        return replace(
            routing,
            token=unit,
            expert=expert,
            weight=mixed[unit, expert],
            top_k=None,
            logits=None,
            scores=None if scores is None else scores @ permutation,
            extra={**routing.extra, PERMUTATION: permutation},
        )

    def after_step(self, counts: Tensor) -> None:
        """Hand on the pairs of each expert [E] as those of its slot."""
        self.router.after_step(counts[self.expert_of_slot()])


def _moved_drops(routing: Routing, moved: Tensor) -> Tensor | None:
    if routing.dropped is None:
        return None
    return torch.stack([routing.dropped[:, 0], moved[routing.dropped[:, 1]]], 1)


@register(
    "balance",
    "permutation-entropy",
    title="Entropy of the soft permutation of local search",
    paper="COMET, KDD 2023",
    needs=("training",),
    limits="For router local-search; 0 once the search is over.",
)
def permutation_entropy(routing: Routing) -> Tensor:
    """Sum of the entropies of the rows of the soft permutation, in nats."""
    permutation = routing.extra.get(PERMUTATION)
    if permutation is None:
        return routing.weight.new_zeros(())
    return -(permutation * (permutation + _ENTROPY_EPS).log()).sum()


@register(
    "router",
    "local-search",
    title="Any router with a learned permutation of its experts",
    paper="COMET, KDD 2023",
    needs=("training",),
    limits="Computes nearly every expert while the search goes on.",
    options={
        "base": "the router whose experts are permuted",
        "base_options": "its options",
        "steps": "steps of training that the search takes (1 to 10 % of them)",
    },
)
def local_search_router(
    width: int,
    num_experts: int,
    top_k: int,
    *,
    base: str = "softmax-renormalised",
    base_options: dict[str, Any] | None = None,
    steps: int = 100,
) -> nn.Module:
    """`LocalSearch` round the router `base`."""
    if steps < 0:
        raise UserError(f"steps {steps} of local search is below 0")
    inner = build_router(base, width, num_experts, top_k, **(base_options or {}))
    return LocalSearch(inner, num_experts, steps)
