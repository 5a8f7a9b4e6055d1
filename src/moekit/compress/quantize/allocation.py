"""How many bits each expert of a layer gets, under a budget.

MC-MoE, arXiv 2410.06270, and MC#, arXiv 2510.10962: the sum of the costs of rounding single experts
is minimised by an integer programme. EdgeMoE, arXiv 2308.14352: the least important experts step
down while a measured loss allows it. Shapes: E experts, B widths.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moekit.core.errors import UserError

# MC-MoE's exponents of frequency, gate weight and error.
ALPHA, BETA, GAMMA = 1.0, 1.5, 1.0
MC_BITS = (1, 2, 3)
# The programme keeps at least one expert at each of these widths.
MC_AT_LEAST = (3, 2)


def mc_costs(
    frequency: Tensor,
    gate: Tensor,
    errors: Tensor,
    *,
    alpha: float = ALPHA,
    beta: float = BETA,
    gamma: float = GAMMA,
) -> Tensor:
    """MC-MoE's cost [E, B] of each width: frequency^alpha * gate^beta * error^gamma.

    `frequency` [E] is an expert's share of the choices, `gate` [E] its share of the probability
    given before renormalisation, `errors` [E, B] the change of the block's output when it alone is
    rounded.
    """
    weight = frequency.double() ** alpha * gate.double() ** beta
    return weight[:, None] * errors.double() ** gamma


def budget_of(
    average: float, num_experts: int, bits: Sequence[int], at_least: Sequence[int]
) -> int:
    """The whole bits of a layer whose experts have `average` bits.

    Raises `UserError` where no choice of widths fits.
    """
    budget = math.floor(average * num_experts + 1e-9)
    least = sum(at_least) + min(bits) * (num_experts - len(at_least))
    if num_experts < len(at_least) or budget < least:
        raise UserError(
            f"--bits-avg {average:g} gives {budget} bits to the {num_experts} experts of a layer; "
            f"with widths {', '.join(map(str, sorted(bits)))} and at least one expert at each of "
            f"{', '.join(map(str, sorted(at_least)))} they need {least}."
        )
    return budget


def allocate(
    costs: Tensor, bits: Sequence[int], budget: int, at_least: Sequence[int] = MC_AT_LEAST
) -> list[int]:
    """The bits of each expert of least summed `costs` [E, B] with at most `budget` bits in all.

    At least one expert gets each of the widths `at_least`. Solved exactly, by HiGHS. Raises
    `UserError` where nothing fits.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    count, widths = len(costs), len(bits)
    chosen = np.kron(np.eye(count), np.ones(widths))
    limits = [
        LinearConstraint(chosen, 1, 1),
        LinearConstraint(np.tile(np.asarray(bits, dtype=float), count), 0, budget),
    ]
    for width in at_least:
        row = np.tile([float(b == width) for b in bits], count)
        limits.append(LinearConstraint(row, 1, count))
    # The solver stops at an absolute gap, so costs must not be tiny.
    scaled = (costs / costs.abs().max().clamp(min=1e-300)).reshape(-1).numpy()
    found = milp(
        scaled,
        constraints=limits,
        integrality=np.ones(count * widths),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        raise UserError(f"No choice of {list(bits)} bits for {count} experts fits {budget} bits.")
    choice: NDArray[np.int64] = found.x.reshape(count, widths).argmax(1)
    return [bits[i] for i in choice]


def allocate_exactly(
    costs: Tensor, bits: Sequence[int], budget: int, at_least: Sequence[int] = MC_AT_LEAST
) -> list[int]:
    """What `allocate` computes, by dynamic programming over experts, bits used and widths met."""
    best: dict[tuple[int, frozenset[int]], tuple[float, tuple[int, ...]]]
    best = {(0, frozenset()): (0.0, ())}
    for row in costs.double().tolist():
        following: dict[tuple[int, frozenset[int]], tuple[float, tuple[int, ...]]] = {}
        for (used, met), (cost, choice) in best.items():
            for width, extra in zip(bits, row, strict=True):
                if used + width > budget:
                    continue
                key = used + width, met | ({width} & set(at_least))
                candidate = cost + extra, (*choice, width)
                if key not in following or candidate < following[key]:
                    following[key] = candidate
        best = following
    complete = [value for (_, met), value in best.items() if met == set(at_least)]
    if not complete:
        raise UserError(f"No choice of {list(bits)} bits fits {budget} bits.")
    return list(min(complete)[1])


@dataclass(frozen=True)
class Steps:
    """What EdgeMoE's search found: bits by unit, its loss, and what it tried (count, loss)."""

    bits: list[int]
    loss: float
    tried: list[tuple[int, float]]


def step_down(
    importance: Tensor,
    widths: Sequence[int],
    measure: Callable[[Sequence[int]], float],
    tolerance: float,
) -> Steps:
    """EdgeMoE's allocation: the K least important units one width down, K as large as allowed.

    `importance` [U] is how much the loss grows when one unit alone has the lowest width; `widths`
    falls from the base width; `measure(bits)` is the loss of an allocation. A unit is one expert of
    one layer. First the base, then for each lower width the largest K whose loss exceeds the base's
    by at most the share `tolerance`, by bisection: the loss is taken to grow with K. A tolerance of
    0 keeps the base.
    """
    order = torch.argsort(importance, stable=True).tolist()
    bits = [widths[0]] * len(order)
    base = measure(bits)
    limit, loss = base * (1 + tolerance), base
    tried = [(0, base)]
    for width in widths[1:] if tolerance > 0 else ():
        low, high = 0, len(order)
        while low < high:
            middle = (low + high + 1) // 2
            candidate = list(bits)
            for unit in order[:middle]:
                candidate[unit] = width
            found = measure(candidate)
            tried.append((middle, found))
            if found <= limit:
                low, loss = middle, found
            else:
                high = middle - 1
        for unit in order[:low]:
            bits[unit] = width
        order = order[:low]
    return Steps(bits, loss, tried)
