"""Average-linkage clustering, for dendrograms of a few hundred experts."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def average_linkage(distance: Array) -> Array:
    """Merge the closest clusters of a symmetric distance matrix [E, E], step by step.

    Returns [E - 1, 4] in the format of SciPy: the numbers of the two clusters (below E: an expert;
    E + i: the cluster of step i), their mean distance, and the experts in the new cluster.
    """
    count = len(distance)
    between = np.array(distance, dtype=np.float64)
    np.fill_diagonal(between, np.inf)
    number, size = np.arange(count), np.ones(count)
    steps = np.empty((max(count - 1, 0), 4))
    for step in range(count - 1):
        first, second = sorted(divmod(int(between.argmin()), count))
        total = size[first] + size[second]
        low, high = sorted((number[first], number[second]))
        steps[step] = low, high, between[first, second], total
        mean = (size[first] * between[first] + size[second] * between[second]) / total
        between[first], between[:, first] = mean, mean
        between[first, first] = np.inf
        between[second], between[:, second] = np.inf, np.inf
        number[first], size[first] = count + step, total
    return steps
