"""From the scores of a predictor to probabilities, learned while it runs.

Shapes: E experts, L layers, B bins.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moekit.runtime.predict.predictor import REACH, Scores

Bins = NDArray[np.intp]

# Bins of half a unit in the logarithm of the odds, from -6 to 6.
BINS = 24
WIDTH = 0.5
# Experts seen in a bin after which the older ones count half.
MEMORY = 4096.0
# The first observations of a bin count beside this many at its prior.
PRIOR = 8.0


class Calibration:
    """How often experts of a score were used, by layers ahead and target layer; forgets slowly.

    Every layer teaches what all its scores were worth, whether they were acted on or not. Before
    that a probability is `base`, that of a random expert.
    """

    def __init__(self, num_layers: int, base: float) -> None:
        self.base = base
        shape = (REACH, num_layers, BINS)
        self._used = np.full(shape, PRIOR * base)
        self._seen = np.full(shape, PRIOR)

    def probability(self, layer: int, ahead: int, bins: Bins) -> NDArray[np.float64]:
        """The chance that experts of `layer` with scores in these bins, given `ahead` layers
        earlier, are used, [E]."""
        row = ahead - 1, layer
        return (self._used[row] / self._seen[row])[bins]

    def learn(self, layer: int, ahead: int, bins: Bins, used: NDArray[np.bool_]) -> None:
        """The experts of `layer` with scores in these bins [E] turned out as `used` [E] says."""
        row = ahead - 1, layer
        self._seen[row] += np.bincount(bins, minlength=BINS)
        self._used[row] += np.bincount(bins[used], minlength=BINS)
        full = self._seen[row] > MEMORY
        if full.any():
            self._seen[row][full] /= 2
            self._used[row][full] /= 2


def bins_of(scores: Scores) -> Bins:
    """The bin of every score [E]."""
    known = np.minimum(np.maximum(scores, 1e-6), 1 - 1e-6)
    place = np.log(known / (1 - known)) / WIDTH + BINS / 2
    return np.minimum(np.maximum(place, 0), BINS - 1).astype(np.intp)
