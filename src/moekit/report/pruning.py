"""What could be pruned first: experts in order of what they add, and what removing them saves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moekit.analyze import Result
from moekit.compress.prune.saliency import score
from moekit.core.errors import UserError
from moekit.core.stats import ExpertStats

if TYPE_CHECKING:
    from moekit.core.spec import MoESpec

Array = NDArray[np.float64]
STEPS = (0.125, 0.25, 0.5)


@dataclass(frozen=True)
class Cut:
    """Removing the same fraction of every layer's experts, those that add least first.

    `share` is the fraction of experts that go (whole experts), `lost` what they add of everything
    that experts add, `saved` bytes, None where the size is not known.
    """

    share: float
    experts: int
    lost: float
    saved: int | None


@dataclass(frozen=True)
class Pruning:
    """What every expert adds, as a share of its layer [E] each; `basis` says in words what it is.

    Shares are zeros in a layer where no expert adds anything. `curve` are (share of
    experts removed, share of contribution lost), `cuts` its round numbers.
    """

    basis: str
    contribution: list[Array]
    curve: list[tuple[float, float]]
    cuts: list[Cut]
    total_bytes: int | None

    def first(self, count: int) -> list[tuple[int, int, float]]:
        """The `count` experts that add least: (position of the layer, expert, times even share)."""
        ranked = [
            (float(value) * len(layer), position, expert)
            for position, layer in enumerate(self.contribution)
            for expert, value in enumerate(layer)
        ]
        return [(position, expert, value) for value, position, expert in sorted(ranked)[:count]]


def pruning_of(
    stats: ExpertStats | None, load: Result | None, spec: MoESpec | None, bits: float
) -> Pruning:
    """Rank experts by their outputs if stats have them, else by the weight routers give them.

    Raises UserError where neither is there.
    """
    basis, sums = _sums(stats, load)
    # Not above zero: silent, or unknown in this family.
    adds = [bool(layer.sum() > 0) for layer in sums]
    if not any(adds):
        raise UserError("no expert added anything")
    contribution = [
        layer / layer.sum() if own else np.zeros(len(layer))
        for layer, own in zip(sums, adds, strict=True)
    ]
    curve, cuts = [], []
    most = max(map(len, contribution))
    ordered = [np.concatenate([[0.0], np.cumsum(np.sort(layer))]) for layer in contribution]
    for removed in range(most):
        share = removed / most
        lost = np.mean([line[int(share * (len(line) - 1))] for line in ordered])
        curve.append((share, float(lost)))
    for step in STEPS:
        removed_by_layer = [int(step * len(layer)) for layer in contribution]
        if not any(removed_by_layer):
            continue
        lost = np.mean([line[n] for line, n in zip(ordered, removed_by_layer, strict=True)])
        experts = sum(removed_by_layer)
        share = experts / sum(map(len, contribution))
        cuts.append(Cut(share, experts, float(lost), _saved(spec, removed_by_layer, bits)))
    total = None if spec is None else spec.bytes(bits)
    return Pruning(basis, contribution, curve, cuts, total)


def _sums(stats: ExpertStats | None, load: Result | None) -> tuple[str, list[Array]]:
    if stats is not None:
        moments = {tuple(moment) for moment in stats.moments}
        if (1, 1, 0) in moments:
            sums = [layer.numpy() for layer in score(stats, "gated-ean")]
            return "router weight times size of the output, summed over tokens", sums
    if load is None or "gate_mass" not in load.detail:
        raise UserError("neither stats of the experts' outputs nor a trace is there to rank by")
    sums = [np.asarray(gate, dtype=np.float64) for gate in load.detail["gate_mass"]]
    return "router weight summed over tokens (stats would add the size of the outputs)", sums


def _saved(spec: MoESpec | None, removed: list[int], bits: float) -> int | None:
    if spec is None or len(spec.per_layer) != len(removed):
        return None
    weights = sum(
        n * layer.params_per_expert for n, layer in zip(removed, spec.per_layer, strict=True)
    )
    return round(weights * bits / 8)
