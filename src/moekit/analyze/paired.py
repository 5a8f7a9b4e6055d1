"""Mean differences of paired values with confidence intervals that respect whole texts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Difference:
    """A mean over tokens and its confidence interval; infinite ends where there are no 2 texts."""

    mean: float
    low: float
    high: float

    @property
    def differs(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


def clustered_mean(sums: Array, counts: Array, confidence: float = 0.95) -> Difference:
    """Mean of values over all tokens, given their sum and number in each text, [S] each.

    Tokens of one text are not independent, so texts are what varies: the interval is Student's with
    the variance of a ratio of sums over texts.
    """
    used = counts > 0
    sums, counts = sums[used], counts[used]
    if not len(sums):
        return Difference(float("nan"), -math.inf, math.inf)
    mean = float(sums.sum() / counts.sum())
    if len(sums) < 2:
        return Difference(mean, -math.inf, math.inf)
    freedom = len(sums) - 1
    rest = sums - mean * counts
    error = math.sqrt((freedom + 1) / freedom * float(rest @ rest)) / float(counts.sum())
    half = student_quantile((1 + confidence) / 2, freedom) * error
    return Difference(mean, mean - half, mean + half)


def student_quantile(share: float, freedom: int) -> float:
    """Quantile of Student's distribution: exact for 1 and 2 degrees of freedom, else to 1 %."""
    if freedom == 1:
        return math.tan(math.pi * (share - 0.5))
    if freedom == 2:
        spread = 4 * share * (1 - share)
        return (2 * share - 1) * math.sqrt(2 / spread)
    z = NormalDist().inv_cdf(share)
    # The expansion of Cornish and Fisher.
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))
