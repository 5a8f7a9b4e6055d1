"""Scaling laws of MoE models: what sparsity and granularity are worth at a compute budget.

Efficiency Leverage (arXiv 2507.17702). C is training compute in FLOPs without embeddings; A the
share of a layer's experts, shared ones included, that a token uses; G = 2 D / F for model width D
and expert width F. Logarithms are of base 10 for C and of base 2 for G: no other pair of bases
reproduces the values that the paper states.
"""

import math
from dataclasses import dataclass

# The law's coefficients as printed.
_A, _D, _GAMMA, _BETA = 1.23, -7.61e-2, 1.67e-2, -1.17e-1
_A_START, _A_MAX = 1.63e-2, 5.28e16
# Budgets at which its points were measured, and the sparsest activation.
FITTED_FLOPS = (3e17, 3e20)
FITTED_ACTIVATION = (1 / 128, 1.0)
# Where the law's exponent is least: about 11.3 (the paper rounds it to 12, good from 8 to 12).
BEST_GRANULARITY = 2 ** (-_BETA / (2 * _GAMMA))


def efficiency_leverage(activation: float, granularity: float, flops: float) -> float:
    """How many times the compute a dense model needs for the loss of an MoE model.

    Between 0.99 and 1 at activation 1, for which the paper says 1. ValueError for an activation
    outside of (0, 1] or a granularity or budget that is not positive.
    """
    if not 0 < activation <= 1 or granularity <= 0 or flops <= 0:
        raise ValueError(
            f"activation {activation} must be in (0, 1], granularity {granularity} and FLOPs "
            f"{flops} positive"
        )
    start = 1 / (1 / _A_START - 1 / _A_MAX)
    saturated = 1 / (1 / (activation + start) + 1 / _A_MAX)
    fine = math.log2(granularity)
    exponent = _A + _D * math.log10(flops) + _GAMMA * fine**2 + _BETA * fine
    return saturated**exponent


@dataclass(frozen=True)
class Allocation:
    """What a budget buys: FLOPs a token, forward and backward; tokens; rate; batch in tokens."""

    flops_per_token: float
    tokens: float
    learning_rate: float
    batch_tokens: float


def moe_allocation(flops: float) -> Allocation:
    """The compute-optimal split of `flops` for MoE models, near-optimal rate and batch with it."""
    return Allocation(
        flops_per_token=0.1915 * flops**0.5095,
        tokens=5.2232 * flops**0.4905,
        learning_rate=1.1576 * flops**-0.1529,
        batch_tokens=0.0694 * flops**0.3644,
    )


def dense_allocation(flops: float) -> tuple[float, float]:
    """FLOPs a token and tokens at the same budget for a dense model."""
    return 0.0655 * flops**0.5422, 15.2582 * flops**0.4578
