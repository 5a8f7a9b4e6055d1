"""The search on losses that are known: it finds what trying everything finds, with fewer probes."""

from __future__ import annotations

import random

import pytest

from moekit.compress.auto.search import Choice, Combination, all_combinations, search
from moekit.core.errors import UserError

CHOICES = {
    "experts": [Choice("experts", name, r) for name in ("a", "b") for r in (0.25, 0.5, 0.75)],
    "bits": [Choice("bits", name, b) for name in ("rtn", "gptq") for b in (8, 4, 3, 2)],
    "rank": [Choice("rank", "svd", r) for r in (0.5, 0.25)],
}


class Known:
    """Losses drawn by a seed, with an interaction between the steps; counts what is asked."""

    def __init__(self, seed: int, interaction: float) -> None:
        draw = random.Random(seed)
        self.single = {}
        for choice in (c for of_kind in CHOICES.values() for c in of_kind):
            harm = choice.level if choice.kind == "experts" else 1 / choice.level
            self.single[choice] = harm * draw.uniform(0.1, 0.4)
        self.interaction = interaction
        self.asked: list[Combination] = []

    def allows(self, combination: Combination) -> bool:
        return True

    def size(self, combination: Combination) -> int:
        share = 1.0
        for choice in combination:
            if choice.kind == "experts":
                share *= 1 - choice.level
            else:
                share *= choice.level / 16 if choice.kind == "bits" else choice.level
        return round(1e6 * share)

    def increase(self, combination: Combination) -> float:
        self.asked.append(combination)
        parts = [self.single[choice] for choice in combination]
        return sum(parts) * (1 + self.interaction * (len(parts) - 1))


@pytest.mark.parametrize("interaction", [0.0, 0.5, -0.3])
@pytest.mark.parametrize("seed", range(3))
def test_picks_are_as_good_as_trying_everything(seed: int, interaction: float) -> None:
    known = Known(seed, interaction)
    budgets = [40_000, 80_000, 150_000, 300_000, 600_000]
    found = search(known, CHOICES, budgets)
    every = all_combinations(CHOICES)
    assert len(known.asked) == len(set(known.asked)) < len(every) / 2
    oracle = Known(seed, interaction)
    for budget in budgets:
        best = min(oracle.increase(c) for c in every if oracle.size(c) <= budget)
        pick = found.picks[budget]
        assert pick.size <= budget
        # One factor for each set of kinds is exact for these losses.
        assert pick.increase == pytest.approx(best)
        singles = [
            known.single[c] for k in CHOICES.values() for c in k if known.size((c,)) <= budget
        ]
        assert pick.increase <= min(singles, default=float("inf"))


def test_the_front_rises_and_falls() -> None:
    found = search(Known(1, 0.2), CHOICES, [100_000])
    sizes = [probe.size for probe in found.front]
    losses = [probe.increase for probe in found.front]
    assert sizes == sorted(set(sizes))
    assert losses == sorted(set(losses), reverse=True)
    assert losses[-1] == 0


def test_few_probes_still_give_a_pick_that_fits() -> None:
    known = Known(2, 0.0)
    smallest = min(known.size(c) for c in all_combinations(CHOICES))
    found = search(known, CHOICES, [smallest], probes=1)
    assert found.picks[smallest].size == smallest


def test_an_impossible_budget_is_refused_before_any_probe() -> None:
    known = Known(0, 0.0)
    with pytest.raises(UserError, match=r"--memory 10 bytes.*smallest"):
        search(known, CHOICES, [10])
    assert known.asked == []
