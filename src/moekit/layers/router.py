"""`PipelineRouter`: a router as a chain of small parts, of which a method replaces one or two.

    units -> score -> squash -> terms -> select -> weigh -> edits -> Routing

- `units(hidden [T, D], context) -> (key [U, Dk], unit_of_token [T])`: what gets one decision and
  what the router reads of it; None: every token, by its hidden state or by `context.key`.
- `score(key, context) -> logits [U, E]`.
- `squash(logits) -> scores [U, E]`: of which weights are made.
- each of `terms`: `(selection [U, E], scores, context) -> selection`: changes the choice and not
  the weights (a bias, noise, a mask of minus infinity).
- `select(selection, context) -> Choice`.
- `weigh(scores, choice, context) -> weight [N]`.
- each of `edits`: `(routing, context) -> routing`: takes pairs away or adds some (a capacity).

A part is a function, or an object that may also have `causal` (False: what one token gets depends
on later ones), `sees_batch` (True: on other sequences), `decodes` (False: a token alone, from a
cache, would be routed otherwise), `after_step(counts)` and `check_pool(pool)`, which raises
UserError for experts that it cannot work with.

A router that does not fit is any module with `forward(hidden [T, D], context) -> Routing`,
`causal`, `sees_batch` and `after_step(counts [E])`. To give a router a name, register a factory
`(width, num_experts, top_k, *, options...) -> module` of kind "router" in a module of its own in
`moekit/layers/routers/`; a router that only sets options of the pipeline is a row in
`routers/presets.py`. See docs/extend/router.md.

Shapes: T tokens, U units, D width, E experts, K chosen, N pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .context import RouterContext
from .routing import Routing


class Choice(NamedTuple):
    """Which experts each unit gets: `unit` and `expert` int64 [N], sorted as pairs of a `Routing`.

    `top_k` is set where every unit has exactly so many.
    """

    unit: Tensor
    expert: Tensor
    top_k: int | None = None


class PipelineRouter(nn.Module):
    """A router made of parts; see the module's text for what each is given and gives.

    Logits, scores and weights are float32, also under autocast.
    """

    # Functions or modules; nn.Module would know their attributes as tensors or modules only.
    score: Any
    squash: Any
    select: Any
    weigh: Any

    def __init__(
        self,
        num_experts: int,
        *,
        score: Callable[[Tensor, RouterContext], Tensor],
        squash: Callable[[Tensor], Tensor],
        select: Callable[[Tensor, RouterContext], Choice],
        weigh: Callable[[Tensor, Choice, RouterContext], Tensor],
        terms: Iterable[Any] = (),
        edits: Iterable[Any] = (),
        units: Any = None,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.units, self.score, self.squash = units, score, squash
        self.select, self.weigh = select, weigh
        self.terms = PartList(terms)
        self.edits = PartList(edits)

    @property
    def causal(self) -> bool:
        """Whether no part lets a token's route depend on later tokens."""
        return all(getattr(part, "causal", True) for part in self._parts())

    @property
    def sees_batch(self) -> bool:
        """Whether a part lets a token's route depend on other sequences of the batch."""
        return any(getattr(part, "sees_batch", False) for part in self._parts())

    def forward(self, hidden: Tensor, context: RouterContext) -> Routing:
        """The routing of `hidden` [T, D]."""
        with torch.autocast(hidden.device.type, enabled=False):
            unit_of_token = None
            key = hidden if context.key is None else context.key
            if self.units is not None:
                key, unit_of_token = self.units(hidden, context)
            logits = self.score(key.float(), context)
            scores = self.squash(logits)
            selection = scores
            for term in self.terms:
                selection = term(selection, scores, context)
            choice = self.select(selection, context)
            weight = self.weigh(scores, choice, context)
        pairs = choice, weight
        if unit_of_token is not None:
            pairs = to_tokens(choice, weight, unit_of_token, scores.shape[0])
        (token, expert, top_k), weight = pairs
        routing = Routing(
            token,
            expert,
            weight,
            num_tokens=hidden.shape[0],
            num_experts=self.num_experts,
            top_k=top_k,
            logits=logits,
            scores=scores,
            token_mask=context.token_mask,
            unit_of_token=unit_of_token,
            cost=context.cost,
            layer=context.layer,
            round=context.round,
        )
        for edit in self.edits:
            routing = edit(routing, context)
        return routing

    @property
    def decodes(self) -> bool:
        """Whether a token alone, from a cache, is routed as it is within its sequence."""
        return all(
            getattr(part, "decodes", getattr(part, "causal", True)) for part in self._parts()
        )

    def check_pool(self, pool: nn.Module) -> None:
        """UserError where a part cannot work with the experts of `pool`."""
        for part in self._parts():
            if hasattr(part, "check_pool"):
                part.check_pool(pool)

    def after_step(self, counts: Tensor) -> None:
        """Hand the pairs of each expert [E], over all processes and micro-batches, to the parts."""
        for part in self._parts():
            if hasattr(part, "after_step"):
                part.after_step(counts)

    def _parts(self) -> list[Any]:
        chain = [self.units, self.score, *self.terms, self.select, self.weigh, *self.edits]
        return [part for part in chain if part is not None]


class PartList(nn.Module):
    """Parts in order, of which those that are modules are registered under their number."""

    def __init__(self, parts: Iterable[Any]) -> None:
        super().__init__()
        self._items = list(parts)
        for number, part in enumerate(self._items):
            if isinstance(part, nn.Module):
                self.add_module(str(number), part)

    def __iter__(self):
        # By number, so that a module that was replaced (wrapped, cast) is the one that is called.
        for number, part in enumerate(self._items):
            yield self._modules.get(str(number), part)


def to_tokens(
    choice: Choice, weight: Tensor, unit_of_token: Tensor, num_units: int
) -> tuple[Choice, Tensor]:
    """The choice and weights of units as those of their tokens."""
    per_unit = torch.bincount(choice.unit, minlength=num_units)
    start = per_unit.cumsum(0) - per_unit
    per_token = per_unit[unit_of_token]
    token = torch.arange(len(unit_of_token), device=weight.device).repeat_interleave(per_token)
    first = per_token.cumsum(0) - per_token
    within = torch.arange(len(token), device=weight.device) - first[token]
    pair = start[unit_of_token[token]] + within
    return Choice(token, choice.expert[pair], choice.top_k), weight[pair]


def keep_pairs(routing: Routing, keep: Tensor, *, dropped: bool = True) -> Routing:
    """`routing` with only the pairs where `keep` [N] is True; the others count as `dropped`."""
    lost = routing.dropped
    if dropped:
        fresh = torch.stack([routing.token[~keep], routing.expert[~keep]], 1)
        lost = fresh if lost is None else torch.cat([lost, fresh])
    return replace(
        routing,
        token=routing.token[keep],
        expert=routing.expert[keep],
        weight=routing.weight[keep],
        top_k=None,
        dropped=lost,
    )
