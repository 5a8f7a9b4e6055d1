"""`Balance`: a loss on routings with its scope, weight and schedule.

What distinguishes published balance losses is mostly over which tokens a load is counted: a
sequence, the micro-batch that is at hand, all processes' micro-batches, or the global batch of an
optimiser step (Demons in the Detail, arXiv 2501.11873).

Shapes: E experts.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moekit.core.errors import UserError
from moekit.core.registry import registry

from ..build import checked
from ..context import RouterContext
from ..routing import Routing
from .load import by_sequence, share_of

SCOPES = ("sequence", "micro", "step", "global")
# What `Balance` hands to a loss that asks for it; not an option of a recipe.
GIVEN = ("share", "layer", "generator")


@dataclass(frozen=True)
class Schedule:
    """A weight from `begin` to `end` of a run (fractions), moving in a line from 1 to `last`.

    Outside of them it is 0.
    """

    begin: float = 0.0
    end: float = 1.0
    last: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.begin < self.end <= 1:
            raise UserError(
                f"a schedule from {self.begin} to {self.end}: begin and end are fractions of the "
                "run, begin before end"
            )

    def at(self, progress: float) -> float:
        """The factor at `progress`, the fraction of the run that is done."""
        if not self.begin <= progress <= self.end:
            return 0.0
        return 1 + (self.last - 1) * (progress - self.begin) / (self.end - self.begin)


class Balance:
    """weight * mean over layers of a loss, with loads counted over `scope`.

    - "sequence": the mean of the losses of the sequences, each by itself;
    - "micro": this micro-batch of this process;
    - "step": this micro-batch of all processes, whose pairs `sum_over_processes` adds up;
    - "global": those of all processes and of the micro-batches of this optimiser step so far, the
      whole global batch at its last one. `after_step` clears that buffer.

    Only loads have a wider scope; probabilities are this process's, so that the mean over processes
    of the losses is the loss of their tokens together. The loss is averaged over layers: over all
    layers at once, an expert that starves in one layer is hidden by others in the rest.
    """

    def __init__(
        self,
        name: str,
        *,
        weight: float,
        scope: str = "micro",
        schedule: Schedule | None = None,
        sum_over_processes: Callable[[Tensor], Tensor] | None = None,
        **options: Any,
    ) -> None:
        self.name, self.weight, self.scope = name, weight, scope
        self.schedule = schedule or Schedule()
        self.loss = _loss(name, options)
        self._asks = set(inspect.signature(self.loss).parameters) & set(GIVEN)
        self._sum = sum_over_processes or (lambda counts: counts)
        self._seen: Tensor | None = None
        if scope not in SCOPES:
            near = difflib.get_close_matches(scope, SCOPES, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"it is one of {', '.join(SCOPES)}"
            raise UserError(f"scope {scope!r} of balance {name!r} is unknown: {hint}")
        if scope in ("step", "global") and "share" not in self._asks:
            raise UserError(
                f"balance {name!r} has no load that could be counted over scope {scope!r}; "
                "use micro or sequence"
            )

    def __call__(
        self,
        records: Sequence[Routing],
        context: RouterContext,
        layers: Sequence[nn.Module | None] = (),
        progress: float = 0.0,
    ) -> Tensor:
        """The weighted loss of a micro-batch whose routings are `records`; 0 where there are none.

        `context` gives the batch and keys random draws; `layers` are the modules that made the
        records, for losses on weights; `progress` is the fraction of the run that is done. Every
        process must call it for every micro-batch, also one whose weight is 0 by now.
        """
        shares = self._shares(records)
        factor = self.weight * self.schedule.at(progress)
        if not factor or not records:
            return torch.zeros(())
        values = []
        for i, routing in enumerate(records):
            given: dict[str, Any] = {}
            if "layer" in self._asks:
                given["layer"] = layers[i] if i < len(layers) else None
            if "generator" in self._asks:
                here = context.enter(routing.layer)
                given["generator"] = here.generator(self.name, routing.weight.device)
            if shares is not None:
                given["share"] = shares[i]
            if self.scope == "sequence":
                parts = by_sequence(routing, context.batch)
                value = torch.stack([self.loss(part, **given) for part in parts]).mean()
            else:
                value = self.loss(routing, **given)
            values.append(value)
        return factor * torch.stack(values).mean()

    def after_step(self) -> None:
        """Forget the loads of the optimiser step that is done."""
        self._seen = None

    @torch.no_grad()
    def _shares(self, records: Sequence[Routing]) -> list[Tensor] | None:
        """The share of each expert by record, over all processes and what has been seen before."""
        if self.scope not in ("step", "global") or not records:
            return None
        sizes = [routing.num_experts for routing in records]
        counts = self._sum(torch.cat([routing.wanted() for routing in records]))
        if self.scope == "global":
            counts = counts if self._seen is None else counts + self._seen
            self._seen = counts
        return [share_of(part) for part in counts.split(sizes)]


def _loss(name: str, options: dict[str, Any]) -> Callable[..., Tensor]:
    """The registered loss `name` with `options`; UserError for a wrong name or option."""
    loss = checked(registry.find(name, kind="balance"), options)
    if "routing" not in inspect.signature(loss).parameters:
        raise UserError(
            f"balance {name!r} is a step and no loss: set balance.rule to 'bias', or choose a "
            "router with a bias_rate"
        )
    return functools.partial(loss, **options)
