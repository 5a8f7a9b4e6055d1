"""Forming batches of requests that need the same experts, from what is predicted of them.

Shapes: N requests, L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moekit.core.registry import register

Usage = NDArray[np.floating]


@register(
    "scheduler",
    "alike-first",
    title="From the queue the request whose predicted experts are most alike to those running",
    paper="ExpertFlow 2410.17954; Read-ME 2410.19123",
    lossless=True,
    limits="For a server under memory, with a predictor that knows a request by its tokens "
    "(expertflow). The papers form whole batches; where requests come and go they are chosen one "
    "by one.",
)
def most_alike(waiting: Sequence[Usage], running: Sequence[Usage]) -> int:
    """Which of the N `waiting` requests to run beside the `running` ones; the first of equals, and
    the first where nothing runs.

    A usage is how often a request is expected to use each expert, of any shape such as [L, E]; two
    are as alike as the cosine of their differences from the mean of all of them.
    """
    if not running or len(waiting) < 2:
        return 0
    rows = np.stack([usage.reshape(-1) for usage in (*waiting, *running)])
    rows = rows - rows.mean(0)
    own, together = rows[: len(waiting)], rows[len(waiting) :].sum(0)
    lengths = np.maximum(np.linalg.norm(own, axis=1), 1e-12)
    return int((own @ together / lengths).argmax())
