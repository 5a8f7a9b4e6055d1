"""EEP's genomes: which experts a layer keeps, and how the dropped ones are mixed into them.

A genome has, for each layer, two matrices [r, E]: a row of `experts` says how much of each original
expert a resulting one is made of, a row of `router` the same for its router row. One-hot rows are
plain pruning. The paper mixes router probabilities; here the rows that make the logits are mixed,
so that stock classes can hold the result. On one-hot rows the two are the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moekit.compress.prune.select import Room
from moekit.core.expert_weights import ExpertWeights
from moekit.core.new_experts import fold
from moekit.core.plan import Action, ExpertPlan, Fingerprint, Fit
from moekit.core.plan_tensors import PlanTensors
from moekit.core.registry import register
from moekit.core.rewrite import Read, Rewrite
from moekit.core.spec import MoESpec
from moekit.core.stats import ExpertStats

NAME = "eep"
# Of the plan's tensors: the mixture of a decoder layer.
EXPERTS = "experts."


@dataclass(frozen=True, eq=False)
class LayerGenome:
    """Rows of one layer: `slots` [r] are the ids under which the results go, all different.

    `experts` and `router` are [r, E] float32. Rows of protected experts come first in their group
    and never change.
    """

    slots: tuple[int, ...]
    experts: Tensor
    router: Tensor

    @classmethod
    def keeping(cls, room: Room, keep: Sequence[int]) -> LayerGenome:
        """Plain pruning to `keep`."""
        ordered = [
            e
            for group in room.groups()
            for e in sorted(set(group) & set(keep), key=lambda e: (e not in room.protected, e))
        ]
        rows = torch.eye(room.num_experts)[ordered]
        return cls(tuple(ordered), rows, rows)

    def named(self) -> LayerGenome:
        """The same rows; those of plain pruning under the ids of the experts that they keep."""
        rows = torch.eye(self.experts.shape[1])
        chosen = self.experts.argmax(1).tolist()
        plain = torch.equal(self.experts, rows[chosen]) and torch.equal(self.router, rows[chosen])
        if not plain or len(set(chosen)) < len(chosen):
            return self
        return LayerGenome(tuple(chosen), self.experts, self.router)

    @property
    def mixes(self) -> bool:
        """Whether it is more than plain pruning to its slots."""
        rows = torch.eye(self.experts.shape[1])[list(self.slots)]
        return not (torch.equal(self.experts, rows) and torch.equal(self.router, rows))


Genome = list[LayerGenome]


def genome_plan(spec: MoESpec, rooms: Sequence[Room], genome: Genome) -> ExpertPlan:
    """The plan that a genome stands for; its tensors hold the mixtures, where there are any."""
    layers, maps, mixed = {}, {}, {}
    for room, layer in zip(rooms, genome, strict=True):
        actions = {e: Action(drop=True) for e in room.gone(layer.slots)}
        layers[room.layer] = actions | {e: Action(protect=True) for e in room.protected}
        if layer.mixes:
            order = sorted(range(len(layer.slots)), key=lambda row: layer.slots[row])
            maps[room.layer] = layer.router[order]
            mixed[f"{EXPERTS}{room.layer}"] = layer.experts[order]
    return ExpertPlan(
        layers,
        Fingerprint.of(spec),
        f"prune: {NAME}",
        dict.fromkeys(maps, "linear"),
        PlanTensors(router_maps=maps, fit=mixed),
        Fit(NAME) if mixed else None,
    )


@register(
    "fuser",
    NAME,
    title="Experts as weighted sums of all of their layer, as a search has found them",
    paper="EEP 2407.00945",
    needs=("weights",),
    limits="Applies a plan that the search eep has made.",
)
class MixedExperts(Rewrite):
    """The rewrite of a plan that mixes experts: each a weighted sum of its layer's original ones.

    The plan's tensors hold a matrix [r, E] for each layer that mixes, rows in the order of the
    survivors. The other arguments are those of every rewrite and are not used.
    """

    def __init__(
        self, plan: ExpertPlan, stats: ExpertStats | None = None, *, model: Path | None = None
    ) -> None:
        self._rows = {
            int(name.removeprefix(EXPERTS)): rows for name, rows in plan.tensors.fit.items()
        }
        self._slots = {
            layer: plan.survivors(layer, rows.shape[1]) for layer, rows in self._rows.items()
        }
        self.identity = {"method": NAME, "tensors": plan.tensors.sha256()}

    def expert(
        self, layer: int, expert: int, members: Mapping[int, float], read: Read
    ) -> ExpertWeights:
        if layer not in self._rows:
            return read(expert)
        row = self._rows[layer][self._slots[layer].index(expert)].tolist()
        return fold({e: weight for e, weight in enumerate(row) if weight}, read)
