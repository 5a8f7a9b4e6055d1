"""Bits by expert: against every combination, and the rules that the papers state.

E experts, B widths.
"""

import itertools

import pytest
import torch

from moekit.compress.quantize.allocation import (
    MC_BITS,
    allocate,
    allocate_exactly,
    budget_of,
    mc_costs,
    step_down,
)
from moekit.core.errors import UserError


def skewed_costs(seed, experts=6):
    generator = torch.Generator().manual_seed(seed)
    frequency, gate = (torch.rand(experts, generator=generator) for _ in range(2))
    errors = torch.rand(experts, 3, generator=generator).sort(dim=1, descending=True).values
    return mc_costs(frequency, gate, errors)


def cost_of(costs, chosen):
    return sum(float(costs[e, MC_BITS.index(b)]) for e, b in enumerate(chosen))


@pytest.mark.parametrize("budget", [9, 12, 14, 17])
@pytest.mark.parametrize("solve", [allocate, allocate_exactly])
def test_no_combination_is_better(budget, solve):
    for seed in range(4):
        costs = skewed_costs(seed)
        least = min(
            cost_of(costs, combination)
            for combination in itertools.product(MC_BITS, repeat=6)
            if sum(combination) <= budget and {2, 3} <= set(combination)
        )
        found = solve(costs, MC_BITS, budget)
        assert cost_of(costs, found) == pytest.approx(least, rel=1e-9)
        assert sum(found) <= budget
        assert {2, 3} <= set(found)


def test_tiny_costs_are_told_apart():
    costs = skewed_costs(1) * 1e-12
    assert allocate(costs, MC_BITS, 12) == allocate(skewed_costs(1), MC_BITS, 12)


def test_using_an_expert_more_never_lowers_its_bits():
    generator = torch.Generator().manual_seed(3)
    gate = torch.rand(6, generator=generator)
    errors = torch.rand(6, 3, generator=generator).sort(dim=1, descending=True).values
    for expert in range(6):
        frequency, before = torch.full((6,), 0.2), 0
        for share in (0.05, 0.2, 0.5, 2.0, 10.0):
            frequency[expert] = share
            found = allocate(mc_costs(frequency, gate, errors), MC_BITS, 12)[expert]
            assert found >= before
            before = found


def test_every_exponent_is_used():
    frequency, gate = torch.tensor([0.25, 0.75]), torch.tensor([0.5, 0.1])
    errors = torch.tensor([[4.0, 2.0], [3.0, 1.0]])
    plain = mc_costs(frequency, gate, errors, alpha=0, beta=0, gamma=1)
    assert torch.equal(plain, errors.double())
    squared = mc_costs(frequency, gate, errors, alpha=0, beta=0, gamma=2)
    assert torch.allclose(squared, errors.double() ** 2)
    assert torch.allclose(
        mc_costs(frequency, gate, errors)[1, 0], torch.tensor(0.75 * 0.1**1.5 * 3).double()
    )


def test_budgets_that_nothing_fits_are_refused():
    assert budget_of(2.5, 8, MC_BITS, (3, 2)) == 20
    with pytest.raises(UserError, match=r"--bits-avg 1 gives 8 bits .* need 11"):
        budget_of(1.0, 8, MC_BITS, (3, 2))
    for solve in (allocate, allocate_exactly):
        with pytest.raises(UserError, match="fits 5 bits"):
            solve(skewed_costs(0), MC_BITS, 5)


IMPORTANCE = torch.tensor([0.3, 0.1, 0.9, 0.2])


def loss_of(bits):
    """Each unit costs its importance, the more the fewer its bits."""
    return 10 + sum(float(i) * (8 - b) for i, b in zip(IMPORTANCE, bits, strict=True))


def test_stepping_down_takes_the_least_important_within_the_tolerance():
    found = step_down(IMPORTANCE, (8, 4, 2), loss_of, tolerance=0.15)
    # 1 (0.4 more) and 3 (0.8) at 4 bits; then expert 1 at 2 bits (0.2) stays within 1.5.
    assert found.bits == [8, 2, 8, 4]
    assert found.loss == pytest.approx(loss_of(found.bits))
    assert found.loss <= 11.5


def test_more_tolerance_never_means_more_bits():
    totals = [
        sum(step_down(IMPORTANCE, (8, 4, 2), loss_of, tolerance=t).bits)
        for t in (0, 0.02, 0.05, 0.1, 0.3, 1.0, 5.0)
    ]
    assert totals[0] == 4 * 8
    assert totals == sorted(totals, reverse=True)
    assert totals[-1] == 4 * 2
