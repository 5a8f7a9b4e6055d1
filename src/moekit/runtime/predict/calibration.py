"""From the scores of a predictor to probabilities, learned while it runs.

Shapes: A layers ahead, E experts, L layers, B bins.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moekit.runtime.predict.predictor import REACH, Scores

Bins = NDArray[np.intp]

# Bins of half a unit in the logarithm of the odds, from -6 to 6.
BINS = 24
WIDTH = 0.5
# Experts seen in a bin after which the older ones count half.
MEMORY = 4096.0
# The first observations of a bin count beside this many at its prior.
PRIOR = 8.0
# In the place of a bin where nothing was expected.
UNKNOWN = -1


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

    def probabilities(self, layer: int, aheads: ArrayLike, bins: Bins) -> NDArray[np.float64]:
        """The chance that experts with scores in these bins [A, E], given after `layer` for the
        layers `aheads` [A] later, are used."""
        steps = np.asarray(aheads)
        where = steps - 1, layer + steps
        rates = self._used[where] / self._seen[where]
        return np.take_along_axis(rates, bins, axis=1)

    def learn(self, layer: int, bins: Bins, used: NDArray[np.bool_]) -> None:
        """The experts of `layer` with scores in these bins [REACH, E], where not UNKNOWN, turned
        out as `used` [E] says."""
        known = bins != UNKNOWN
        places = bins + BINS * np.arange(REACH)[:, None]
        for counts, which in ((self._seen, known), (self._used, known & used)):
            found = np.bincount(places[which], minlength=REACH * BINS)
            counts[:, layer] += found.reshape(REACH, BINS)
        seen = self._seen[:, layer]
        if seen.max() > MEMORY:
            full = seen > MEMORY
            self._seen[:, layer][full] /= 2
            self._used[:, layer][full] /= 2


def bins_of(scores: Scores) -> Bins:
    """The bin of every score [E]."""
    known = np.minimum(np.maximum(scores, 1e-6), 1 - 1e-6)
    place = np.log(known / (1 - known)) / WIDTH + BINS / 2
    return np.minimum(np.maximum(place, 0), BINS - 1).astype(np.intp)
