"""In which order the missing experts of a layer are read."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moekit.core.registry import register


@register(
    "scheduler",
    "hebf",
    title="Read the expert that most tokens wait for first: its computing hides the next reads",
    paper="D2MoE 2504.15299; Fate 2502.12224",
    lossless=True,
    limits="What an expert cache always does. The bit planes of an expert are read together, so "
    "experts are ordered and not planes.",
)
def hottest_first(counts: ArrayLike) -> NDArray[np.intp]:
    """The order in which to read experts that `counts` [n] tokens wait for; equal ones in their
    own order."""
    return np.argsort(-np.asarray(counts), kind="stable")
