"""Programs that take turns on the same tokens, and what their times say.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from moekit.bench.workers import Worker

# What a round of a program is made of.
DECODE, PREFILL = "decode_ms", "prefill_tokens_per_second"


def distance(found: np.ndarray, exact: np.ndarray) -> float:
    """Median over tokens of the relative distance of logits [T, V]."""
    gaps = np.linalg.norm(found - exact, axis=1) / np.linalg.norm(exact, axis=1)
    return float(np.median(gaps))


def turn(worker: Worker, prompt: Sequence[int], steps: Sequence[int]) -> dict[str, float]:
    """One prompt and its continuation; ms a token is the median of the steps."""
    seconds = worker.call("prefill", ids=list(prompt))
    decode = worker.call("decode", ids=list(steps))
    return {PREFILL: len(prompt) / seconds, DECODE: 1000 * statistics.median(decode)}


def in_turns(
    programs: Mapping[str, Callable[[], Worker]],
    texts: Callable[[int], tuple[Sequence[int], Sequence[int]]],
    rounds: int,
) -> dict[str, Any]:
    """All programs open at once, taking turns; `texts` gives prompt and continuation of a round.

    Round 0 is not counted. By program its seconds to open, its memory and its rounds.
    """
    with ExitStack() as stack:
        workers = {name: stack.enter_context(start()) for name, start in programs.items()}
        for worker in workers.values():
            turn(worker, *texts(0))
        rows: dict[str, list[dict[str, float]]] = {name: [] for name in programs}
        for number in range(1, rounds + 1):
            for name, worker in workers.items():
                rows[name].append(turn(worker, *texts(number)))
        return {
            name: {"opening_seconds": w.opening, "memory": w.call("memory"), "rounds": rows[name]}
            for name, w in workers.items()
        }


def summarise(found: dict[str, Any]) -> None:
    """Add the medians over the rounds of each program."""
    for row in found.values():
        for field in (DECODE, PREFILL):
            row[field] = statistics.median(r[field] for r in row["rounds"])


def ratios(
    found: Mapping[str, Any], pairs: Sequence[tuple[str, str]]
) -> dict[str, dict[str, float]]:
    """How many times as fast the first of a pair is: the median over rounds of both."""
    made = {}
    for one, other in pairs:
        rounds = list(zip(found[one]["rounds"], found[other]["rounds"], strict=True))
        made[f"{one} / {other}"] = {
            "decode": statistics.median(b[DECODE] / a[DECODE] for a, b in rounds),
            "prefill": statistics.median(a[PREFILL] / b[PREFILL] for a, b in rounds),
        }
    return made
