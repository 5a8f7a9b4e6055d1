"""Forming batches of requests that need the same experts: those whose prompts have alike tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moekit.core.registry import register

# Token ids share this many counts, so that a large vocabulary takes no more.
BUCKETS = 8192


def token_counts(prompt: Sequence[int]) -> NDArray[np.float64]:
    """How often each token, by its id modulo `BUCKETS`, is in a prompt."""
    ids = np.asarray(prompt, dtype=np.int64) % BUCKETS
    return np.bincount(ids, minlength=BUCKETS).astype(np.float64)


@register(
    "scheduler",
    "alike-first",
    title="From the queue the request whose prompt is most alike to those running",
    paper="ExpertFlow 2410.17954; Read-ME 2410.19123",
    lossless=True,
    limits="The papers form whole batches from predicted experts. Where requests come and go they "
    "are chosen one by one, and the tokens of the prompts predict as well as their routing does.",
)
def most_alike(waiting: Sequence[NDArray], running: Sequence[NDArray]) -> int:
    """Which of the `waiting` requests to run beside the `running` ones; the first of equals, and
    the first where nothing runs.

    A request is known by an array of any shape, such as its `token_counts`; two are as alike as the
    cosine of their differences from the mean of all of them.
    """
    if not running or len(waiting) < 2:
        return 0
    rows = np.stack([row.reshape(-1) for row in (*waiting, *running)])
    rows = rows - rows.mean(0)
    own, together = rows[: len(waiting)], rows[len(waiting) :].sum(0)
    lengths = np.maximum(np.linalg.norm(own, axis=1), 1e-12)
    return int((own @ together / lengths).argmax())
