"""Decoding and prefill with everything in memory, beside other programs; checked before timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from moekit.bench.programs import F16, STORED, TRANSFORMERS, Programs
from moekit.bench.turns import distance, in_turns, ratios, summarise
from moekit.bench.workers import Worker

# The error may be this many times that of transformers' modules in bf16 on the same weights: all
# round to bf16 in other places.
TOLERANCE = 1.1
# llama.cpp's 4 bits are other weights than moekit's; further off than this is another model.
OTHER_WEIGHTS = 2.0


def check(programs: Programs, ids: Sequence[int], *options: str) -> dict[str, dict[str, Any]]:
    """The distance of every program's logits on `ids` to the same weights in float32, the limit of
    it, and whether it holds.

    `options` go to moekit where it runs the packed model, such as a memory.
    """
    tokens = list(ids)

    def logits(start: Callable[[], Worker]) -> np.ndarray:
        with start() as worker:
            return worker.logits(tokens)

    def modules(dtype: str) -> np.ndarray:
        return logits(lambda: programs.moekit("--runner", "graph", "--dtype", dtype, *options))

    own = programs.name
    exact = modules("float32")
    found = {own: logits(lambda: programs.moekit(*options))}
    rows = {own: _row(found[own], exact, TOLERANCE * distance(modules("bfloat16"), exact))}
    if programs.model is None:
        return rows
    stored = logits(lambda: programs.transformers("float32"))
    others = [name for name in programs.starts if name != own]
    found |= {name: logits(programs.starts[name]) for name in others}
    limit = TOLERANCE * distance(found[TRANSFORMERS], stored)
    for name in (STORED, TRANSFORMERS, F16):
        if name in found:
            rows[name] = _row(found[name], stored, limit)
    quantised = programs.quantised_peer
    if quantised in found:
        limit = OTHER_WEIGHTS * distance(found[own], stored)
        rows[quantised] = _row(found[quantised], stored, limit)
    return rows


def _row(found: np.ndarray, exact: np.ndarray, limit: float) -> dict[str, Any]:
    gap = distance(found, exact)
    same = float((found.argmax(1) == exact.argmax(1)).mean())
    return {"distance": gap, "limit": limit, "top_1": same, "ok": gap <= limit}


def run_in_memory(
    programs: Programs,
    checked: dict[str, dict[str, Any]],
    ids: Sequence[int],
    *,
    prompt: int,
    steps: int,
    rounds: int,
) -> dict[str, Any]:
    """Time the programs whose check holds, taking turns on pieces of `ids`."""
    sound = {name: start for name, start in programs.starts.items() if checked[name]["ok"]}
    if not sound:
        return {"programs": {}, "ratios": {}}

    def texts(number: int) -> tuple[list[int], list[int]]:
        begin = number * (prompt + steps)
        piece = [ids[(begin + i) % len(ids)] for i in range(prompt + steps)]
        return piece[:prompt], piece[prompt:]

    found = in_turns(sound, texts, rounds)
    summarise(found)
    pairs = [
        (programs.name, programs.quantised_peer),
        (STORED, F16),
        (programs.name, TRANSFORMERS),
        (STORED, TRANSFORMERS),
    ]
    return {
        "programs": found,
        "ratios": ratios(found, [pair for pair in pairs if set(pair) <= set(found)]),
    }
