"""Tables of how often an expert follows others a layer or more later (EdgeMoE).

Shapes: T tokens, K chosen, E experts, M pairs kept, L layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from moekit.core.errors import UserError
from moekit.core.registry import register_preset
from moekit.core.trace import RoutingTrace
from moekit.runtime.predict.predictor import (
    REACH,
    Predictor,
    Scores,
    any_of,
    chosen_ids,
    multi_hot,
    shape_of,
)

# Observations that a less specific estimate counts for in a more specific one.
PRIOR = 4.0
CHUNK = 2**12


class Transitions(Predictor):
    """The chance of an expert given each expert of the last layer, or with `order` 2 given each
    pair of experts of the last two; averaged over those that a token chose.

    Pairs beyond the `pairs` most frequent of a layer, and those that were never seen, fall back on
    the single expert, which falls back on popularity.
    """

    learns = True

    def __init__(self, *, order: int = 2, pairs: int = 4096) -> None:
        if order not in (1, 2) or pairs < 1:
            raise UserError(f"order is 1 or 2 and pairs 1 or more, not {order} and {pairs}")
        self.order, self.pairs = order, pairs
        self._tables: dict[str, NDArray] = {}

    def fit(self, traces: Sequence[RoutingTrace]) -> None:
        num_layers, num_experts, _ = shape_of(traces)
        tables: dict[str, NDArray] = {}
        popular = np.stack([_popularity(traces, n, num_experts) for n in range(num_layers)])
        tables["popular"] = popular.astype(np.float32)
        for layer in range(num_layers):
            reach = min(REACH, num_layers - 1 - layer)
            keys = np.zeros(0, dtype=np.int64)
            if self.order == 2 and layer and reach:
                keys = self._frequent_pairs(traces, layer, num_experts)
                tables[f"keys.{layer}"] = keys
            for ahead in range(1, reach + 1):
                name = f"{layer}.{ahead}"
                single, paired = _counts(traces, layer, ahead, num_experts, keys)
                single = _smooth(single, popular[layer + ahead])
                tables[f"single.{name}"] = single.astype(np.float16)
                if len(keys):
                    paired = _smooth(paired, single[keys % num_experts])
                    tables[f"paired.{name}"] = paired.astype(np.float16)
        self._tables = tables

    def _frequent_pairs(
        self, traces: Sequence[RoutingTrace], layer: int, num_experts: int
    ) -> NDArray[np.int64]:
        counts = np.zeros(num_experts**2, dtype=np.int64)
        for (before, now), _ in _chunks(traces, (layer - 1, layer)):
            codes = _pairs(before, now, num_experts)
            counts += np.bincount(codes[codes >= 0], minlength=len(counts))
        best = np.argsort(-counts, kind="stable")[: self.pairs]
        return np.sort(best[counts[best] > 0])

    def state(self) -> dict[str, NDArray]:
        return self._tables

    def restore(self, state: dict[str, NDArray]) -> None:
        experts = state["popular"].shape[1]
        for name, table in state.items():
            single = name.startswith(("single", "paired"))
            if single and (table.ndim != 2 or table.shape[1] != experts):
                raise ValueError(f"{name} of shape {table.shape}")
        self._tables = state

    def start(self, num_layers: int, num_experts: int, top_k: int) -> None:
        super().start(num_layers, num_experts, top_k)
        if not self._tables:
            raise UserError("transitions are learned: fit the predictor to a trace first")
        self._check_shape(*self._tables["popular"].shape)

    def predict(self, layer: int, ahead: int) -> Scores:
        target = layer + ahead
        single = self._tables.get(f"single.{layer}.{ahead}")
        now = self.chosen.get(layer)
        if single is None or now is None:
            return self._tables["popular"][target]
        rows = single[np.maximum(now, 0)].astype(np.float32)
        rows[now < 0] = self._tables["popular"][target]
        before = self.chosen.get(layer - 1)
        keys = self._tables.get(f"keys.{layer}")
        if keys is None or before is None:
            return any_of(rows.mean(1))
        codes = _pairs(before, now, self.num_experts)
        found = np.minimum(np.searchsorted(keys, codes), len(keys) - 1)
        known = keys[found] == codes
        paired = self._tables[f"paired.{layer}.{ahead}"][found].astype(np.float32)
        # The pairs of a token come in the order of its later expert, so each has its fallback.
        fallback = np.repeat(rows, before.shape[1], axis=1)
        return any_of(np.where(known[:, :, None], paired, fallback).mean(1))


def _chunks(
    traces: Sequence[RoutingTrace], layers: tuple[int, ...]
) -> Iterator[tuple[list[NDArray[np.int64]], int]]:
    for trace in traces:
        for start in range(0, len(trace), CHUNK):
            stop = min(start + CHUNK, len(trace))
            yield [chosen_ids(trace, layer, start, stop) for layer in layers], stop - start


def _popularity(
    traces: Sequence[RoutingTrace], layer: int, num_experts: int
) -> NDArray[np.float64]:
    counts, tokens = np.zeros(num_experts), 0
    for (ids,), size in _chunks(traces, (layer,)):
        counts += np.bincount(ids[ids >= 0], minlength=num_experts)
        tokens += size
    return counts / tokens


def _pairs(
    before: NDArray[np.int64], now: NDArray[np.int64], num_experts: int
) -> NDArray[np.int64]:
    """Codes [T, K * K] of the pairs, each later expert with every earlier one; -1 for none."""
    codes = before[:, None, :] * num_experts + now[:, :, None]
    real = (before[:, None, :] >= 0) & (now[:, :, None] >= 0)
    return np.where(real, codes, -1).reshape(len(now), -1)


def _counts(
    traces: Sequence[RoutingTrace],
    layer: int,
    ahead: int,
    num_experts: int,
    keys: NDArray[np.int64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Uses of every expert after each expert [E, E + 1] and after each pair of `keys` [M, E + 1].

    The last column counts the tokens.
    """
    single = np.zeros((num_experts, num_experts + 1))
    paired = np.zeros((len(keys), num_experts + 1))
    for (before, now, then), size in _chunks(traces, (max(layer - 1, 0), layer, layer + ahead)):
        used = np.hstack([multi_hot(then, num_experts), np.ones((size, 1), np.float32)])
        single += multi_hot(now, num_experts).T @ used
        if len(keys):
            codes = _pairs(before, now, num_experts)
            rows = np.minimum(np.searchsorted(keys, codes), len(keys) - 1)
            known = keys[rows] == codes
            # Expert E stands for the token itself, which is counted in the last column.
            column = np.full((size, 1), num_experts)
            after = np.hstack([then, column])[:, None, :]
            cells = rows[:, :, None] * (num_experts + 1) + after
            cells = cells[known[:, :, None] & (after >= 0)]
            paired += np.bincount(cells, minlength=paired.size).reshape(paired.shape)
    return single, paired


def _smooth(counts: NDArray[np.float64], prior: NDArray[np.float64]) -> NDArray[np.float64]:
    return (counts[:, :-1] + PRIOR * prior) / (counts[:, -1:] + PRIOR)


register_preset(
    Transitions,
    "transitions",
    kind="predictor",
    title="Conditional frequencies given the experts of the last layer",
    paper="EdgeMoE 2308.14352",
    needs=("trace",),
    lossless=True,
    settings={"order": 1},
)
register_preset(
    Transitions,
    "edgemoe",
    kind="predictor",
    title="Conditional frequencies given the experts of the last two layers",
    paper="EdgeMoE 2308.14352",
    needs=("trace",),
    lossless=True,
    limits="The paper's key is the whole set of both layers; with several experts a token these "
    "rarely repeat, so pairs of experts are counted and averaged.",
    settings={"order": 2},
)
