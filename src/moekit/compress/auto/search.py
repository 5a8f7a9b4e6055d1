"""Searching combinations of compression steps: few real probes, the rest predicted from them.

A combination takes at most one choice of each kind (which experts stay, how many bits, what rank).
Sizes are exact and cheap; losses cost a pass over the probe text. So every choice is probed alone
once, combinations are predicted as the sum of their parts' increases times a factor for what parts
of these kinds do to each other, the best predictions within each budget are probed in turn, and
what they show corrects the factors. A pick is always a probed combination, never a predicted one.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from moekit.core.errors import UserError

# An increase below this is noise of the probe text, and says nothing about how steps interact.
SMALLEST_INCREASE = 1e-3


@dataclass(frozen=True, order=True)
class Choice:
    """One step at one strength: `kind` groups choices that exclude one another."""

    kind: str
    name: str
    level: float

    def __str__(self) -> str:
        return f"{self.name} {self.level:g}"


Combination = tuple[Choice, ...]
Kinds = tuple[str, ...]


def kinds_of(combination: Combination) -> Kinds:
    """The kinds of a combination's choices, in order."""
    return tuple(choice.kind for choice in combination)


class Problem(Protocol):
    """What the search asks of a model."""

    def allows(self, combination: Combination) -> bool:
        """Whether the steps of `combination` can be done together."""
        ...

    def size(self, combination: Combination) -> int:
        """Bytes of the model after `combination`."""
        ...

    def increase(self, combination: Combination) -> float:
        """Measured loss above that of the unchanged model, bits per byte."""
        ...


@dataclass(frozen=True)
class Probe:
    """A combination that was measured: bytes, and bits per byte above the unchanged model."""

    combination: Combination
    size: int
    increase: float

    def __str__(self) -> str:
        return " + ".join(map(str, self.combination)) or "unchanged"


@dataclass(frozen=True)
class SearchResult:
    """All probes; the front of those nothing beats, by size; the pick of each budget."""

    probes: list[Probe]
    front: list[Probe]
    picks: dict[int, Probe]


@dataclass
class _State:
    problem: Problem
    limit: int
    progress: Callable[[int, int], None] | None
    probes: dict[Combination, Probe] = field(default_factory=dict)

    def probe(self, combination: Combination) -> Probe:
        if combination not in self.probes:
            increase = self.problem.increase(combination) if combination else 0.0
            size = self.problem.size(combination)
            self.probes[combination] = Probe(combination, size, increase)
            if self.progress is not None:
                self.progress(len(self.probes), max(self.limit, len(self.probes)))
        return self.probes[combination]

    def predict(self, combination: Combination, factors: Mapping[Kinds, float]) -> float:
        if combination in self.probes:
            return self.probes[combination].increase
        return factors.get(kinds_of(combination), 1.0) * self.sum_of_parts(combination)

    def sum_of_parts(self, combination: Combination) -> float:
        return sum(self.probes[(choice,)].increase for choice in combination)

    def factors(self) -> dict[Kinds, float]:
        """By kinds of steps: how much more they cost together than alone, median of the probes."""
        ratios: dict[Kinds, list[float]] = {}
        for combination, probe in self.probes.items():
            parts = self.sum_of_parts(combination)
            if len(combination) > 1 and parts > SMALLEST_INCREASE:
                ratios.setdefault(kinds_of(combination), []).append(probe.increase / parts)
        return {kinds: max(statistics.median(found), 0.0) for kinds, found in ratios.items()}


def search(
    problem: Problem,
    choices: Mapping[str, Sequence[Choice]],
    budgets: Sequence[int],
    *,
    probes: int = 60,
    progress: Callable[[int, int], None] | None = None,
) -> SearchResult:
    """The least loss within each budget of bytes, with about `probes` measurements.

    `choices` are the steps by kind. Every choice is probed alone first, and one combination of each
    set of kinds (those are not bounded by `probes`, since nothing can be predicted without them);
    then, in rounds over the budgets, the combination with the least predicted increase that fits
    and was not probed yet, until each budget's best prediction has been measured or the probes are
    used up. `progress` gets (probes done, expected). Raises `UserError` for a budget below the
    smallest combination.
    """
    combinations = [c for c in all_combinations(choices) if problem.allows(c)]
    sizes = {combination: problem.size(combination) for combination in combinations}
    smallest = min(sizes, key=lambda combination: sizes[combination])
    for budget in budgets:
        if budget < sizes[smallest]:
            raise UserError(
                f"--memory {budget:,} bytes is less than the smallest combination takes: "
                f"{' + '.join(map(str, smallest))}, {sizes[smallest]:,} bytes."
            )
    state = _State(problem, probes, progress)
    state.probe(())
    for choice in sorted({choice for combination in combinations for choice in combination}):
        state.probe((choice,))
    middle = sorted(budgets)[len(budgets) // 2]
    for kinds in dict.fromkeys(map(kinds_of, combinations)):
        if len(kinds) > 1:
            alike = [c for c in combinations if kinds_of(c) == kinds]
            state.probe(min(alike, key=lambda c: (abs(sizes[c] - middle), state.sum_of_parts(c))))
    open_budgets = sorted(set(budgets))
    while open_budgets and len(state.probes) < max(probes, len(open_budgets)):
        factors = state.factors()
        for budget in list(open_budgets):
            fitting = [c for c in combinations if sizes[c] <= budget]
            best = min(fitting, key=lambda c: (state.predict(c, factors), sizes[c]))
            if best in state.probes:
                open_budgets.remove(budget)
            elif len(state.probes) < probes:
                state.probe(best)
        if len(state.probes) >= probes:
            break
    found = sorted(state.probes.values(), key=lambda probe: (probe.size, probe.increase))
    picks = {}
    for budget in budgets:
        fitting_probes = [probe for probe in found if probe.size <= budget]
        if not fitting_probes:
            # Every prediction within the budget is still a guess; the smallest is sure to fit.
            fitting_probes = [state.probe(smallest)]
        picks[budget] = min(fitting_probes, key=lambda probe: (probe.increase, probe.size))
    found = sorted(state.probes.values(), key=lambda probe: (probe.size, probe.increase))
    return SearchResult(found, _front(found), picks)


def all_combinations(choices: Mapping[str, Sequence[Choice]]) -> list[Combination]:
    """Every combination of at most one choice of each kind, the empty one included."""
    options = [[(), *((choice,) for choice in of_kind)] for of_kind in choices.values()]
    return [tuple(itertools.chain(*parts)) for parts in itertools.product(*options)]


def _front(probes: Sequence[Probe]) -> list[Probe]:
    front: list[Probe] = []
    for probe in probes:
        if not front or probe.increase < front[-1].increase:
            front.append(probe)
    return front
