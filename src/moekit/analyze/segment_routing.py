"""SRP: how well one set of experts could serve a whole segment of tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moekit.analyze.reading import check_filled, multi_hot, numbers, pieces, read_ids, rows_of
from moekit.analyze.result import Result
from moekit.core.errors import UserError
from moekit.core.registry import register
from moekit.core.seeds import derive_seed
from moekit.core.trace import RoutingTrace


@register(
    "measure",
    "srp",
    title="Segment routing best performance: local routing consistency",
    paper="Not All Models Suit Expert Offloading 2505.16056",
    needs=("trace",),
    options={
        "segments": "lengths of a segment in tokens, separated by commas",
        "max_tokens": "tokens read, in pieces spread evenly",
        "bootstrap": "resamples of the pieces for the interval",
        "seed": "seed of the resamples",
    },
)
def srp(
    trace: RoutingTrace,
    *,
    segments: str = "4,16,64,256",
    max_tokens: int = 2**15,
    bootstrap: int = 200,
    seed: int = 0,
) -> Result:
    """Measure the best F1 of a router that chooses one set of experts for m tokens at a time.

    1 is a router that keeps its experts, 2K / (E + K) the least that long segments can have. `size`
    is the number of experts the best segment router takes, over K. Segments overlap and do not
    cross samples. The summary is over all layers with one threshold, with a 95 % interval from
    resampled pieces. Raises UserError where no sample is as long as the shortest segment.
    """
    check_filled(trace)
    lengths = [int(m) for m in numbers(segments, "segments")]
    chosen = pieces(trace, max_tokens, 4096)
    longest = max(map(len, chosen))
    usable = [m for m in lengths if m <= longest]
    if not usable:
        raise UserError(
            f"the longest sample read has {longest} tokens; segments of {segments} do not fit: "
            "set shorter segments"
        )
    rows = rows_of(chosen)
    histograms = {m: np.zeros((len(trace.layers), len(chosen), m + 1)) for m in usable}
    for position, layer in enumerate(trace.layers):
        hot = multi_hot(read_ids(trace, position, rows), layer.num_experts)
        end = 0
        for number, piece in enumerate(chosen):
            start, end = end, end + len(piece)
            total = np.zeros((len(piece) + 1, layer.num_experts), dtype=np.int64)
            np.cumsum(hot[start:end], axis=0, out=total[1:])
            for m in usable:
                counts = total[m:] - total[:-m]
                histograms[m][position, number] = np.bincount(counts.ravel(), minlength=m + 1)
    table = []
    for position, layer in enumerate(trace.layers):
        floor = 2 * layer.top_k / (layer.num_experts + layer.top_k)
        scores = [_best(histograms[m][position].sum(0)) for m in usable]
        table.append((layer.index, *(s for s, _ in scores), scores[-1][1], floor))
    random = np.random.default_rng(derive_seed(seed, "srp"))
    draws = random.multinomial(len(chosen), np.full(len(chosen), 1 / len(chosen)), bootstrap)
    summary: dict[str, Any] = {"tokens": len(rows), "pieces": len(chosen)}
    for m in usable:
        by_piece = histograms[m].sum(0)
        score, size = _best(by_piece.sum(0))
        summary[f"srp_{m}"], summary[f"size_{m}"] = score, size
        if bootstrap and len(chosen) > 1:
            again = [_best(draw @ by_piece)[0] for draw in draws]
            low, high = np.quantile(again, [0.025, 0.975])
            summary[f"interval_{m}"] = (2 * score - float(high), 2 * score - float(low))
    columns = ("layer", *(f"m={m}" for m in usable), f"size({usable[-1]})", "floor")
    return Result(columns, table, summary)


def _best(histogram: NDArray[np.float64]) -> tuple[float, float]:
    """The best F1 over thresholds of segment counts 0 to m, and the size of the set over K."""
    m = len(histogram) - 1
    counts = np.arange(m + 1)
    hit = np.cumsum((histogram * counts)[::-1])[::-1]
    taken = m * np.cumsum(histogram[::-1])[::-1]
    used = hit[0]
    if not used:
        return float("nan"), float("nan")
    score = 2 * hit / (taken + used)
    # Of equal scores the smaller set.
    best = m - int(np.argmax(score[::-1]))
    return float(score[best]), float(taken[best] / used)
