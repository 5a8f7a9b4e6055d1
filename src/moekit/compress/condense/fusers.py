"""What becomes of a group: the registered fusers, each over a kernel of its own.

A fuser that only sums its members is said by the plan alone (`linear`); any other is a `Rewrite`.
Shapes: S sampled tokens, F neurons, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moekit.compress.condense.average import Member, average
from moekit.compress.condense.fisher import FLOOR, fisher_average
from moekit.compress.condense.least_squares import (
    Target,
    refit_down,
    regression_mean,
)
from moekit.compress.condense.low_rank_sparse import low_rank_sparse
from moekit.compress.condense.recombine import recombine
from moekit.compress.condense.segments import TAU, Owners, owners
from moekit.compress.condense.subspace import subspace_average
from moekit.compress.condense.zip_neurons import zip_neurons
from moekit.compress.quantize.layer_experts import middle_of
from moekit.core.architecture import meta_model, read_config
from moekit.core.errors import UserError
from moekit.core.expert_weights import ExpertWeights
from moekit.core.layer import MoELayer
from moekit.core.neurons import from_rows, neuron_rows
from moekit.core.plan import ExpertPlan
from moekit.core.registry import register
from moekit.core.rewrite import Read, Rewrite
from moekit.core.stats import ExpertStats
from moekit.core.view import MoEView
from moekit.ops.regression import RIDGE

KIND = "fuser"


class GroupFuser(Rewrite):
    """Computes one expert from the members of its group; lone experts stay as they are.

    `sets` are those of `moekit profile` that it reads beyond the default one. `model` is the
    directory of the original model.
    """

    name = ""
    linear = False
    sets: tuple[str, ...] = ()

    def __init__(
        self, plan: ExpertPlan, stats: ExpertStats | None, *, model: Path, **options: Any
    ) -> None:
        if stats is None:
            raise UserError(f"{self.name} needs the stats it was planned with; give --stats.")
        self.plan, self.stats, self._model = plan, stats, model
        self._position = {layer.index: p for p, layer in enumerate(stats.layers)}
        self._held: tuple[int, dict[str, Tensor]] = (-1, {})
        self.identity = {"fuser": self.name, "stats": stats.digest(), **options}

    def expert(
        self, layer: int, expert: int, members: Mapping[int, float], read: Read
    ) -> ExpertWeights:
        """See `Rewrite.expert`."""
        if list(members.values()) == [1.0]:
            return read(expert)
        group = [Member(share, read(e), e) for e, share in members.items()]
        return self.fuse(self._position[layer], layer, group)

    def fuse(self, position: int, layer: int, members: list[Member]) -> ExpertWeights:
        """One expert for `members`, whose neurons are in the group's order."""
        raise NotImplementedError

    def statistic(self, position: int, name: str) -> Tensor:
        """A statistic of a layer, kept until another layer is asked for: it may lie on disk."""
        if self._held[0] != position:
            self._held = (position, {})
        held = self._held[1]
        if name not in held:
            held[name] = self.stats.get(position, name)
        return held[name]

    def in_order(self, layer: int, expert: int, values: Tensor) -> Tensor:
        """Rows [F, ...] of an expert's neurons as the plan orders them."""
        order = self.plan.tensors.neurons.get((layer, expert))
        return values if order is None else values[order]

    def sample(self, position: int, expert: int) -> tuple[Tensor, Tensor]:
        """The sampled inputs of an expert [S, D] and their gate weights [S]."""
        hidden = self.statistic(position, "sample_hidden")
        token, choice = (self.statistic(position, "sample_ids") == expert).nonzero(as_tuple=True)
        return hidden[token], self.statistic(position, "sample_weights")[token, choice]

    def middle(self, position: int, expert: ExpertWeights, hidden: Tensor) -> Tensor:
        return middle_of(self._layers[position], expert, hidden)

    @cached_property
    def _layers(self) -> Sequence[MoELayer]:
        """The layers without weights: they know the activation."""
        return MoEView(meta_model(read_config(self._model))).layers


@register(
    KIND,
    "average",
    title="Sum of the members' weights times their shares",
    paper="M-SMoE 2310.01334",
    needs=("weights",),
)
class Average(GroupFuser):
    """Said by the plan alone."""

    name = "average"
    linear = True


@register(
    KIND,
    "fisher",
    title="Average weighted entry by entry with the diagonal of the Fisher information",
    paper="Fisher merging 2111.09832",
    needs=("weights", "data", "gradients"),
    limits="Information of biases of the output is not kept; they are averaged.",
    options={"floor": "least information of an entry, of the members' mean"},
)
class Fisher(GroupFuser):
    """The information is the model's own, from backward passes with drawn labels."""

    name = "fisher"
    sets = ("fisher",)

    def __init__(
        self, plan: ExpertPlan, stats: ExpertStats | None, *, model: Path, floor: float = FLOOR
    ) -> None:
        super().__init__(plan, stats, model=model, floor=floor)
        self._floor = floor

    def fuse(self, position: int, layer: int, members: list[Member]) -> ExpertWeights:
        information = self.statistic(position, "neuron_fisher")
        held = [self.in_order(layer, m.id, information[m.id]) for m in members]
        return fisher_average(members, held, self._floor)


@register(
    KIND,
    "subspace",
    title="Average within the main left singular vectors of the group's matrices side by side",
    paper="Sub-MoE 2506.23266, as compared in REAP 2510.13999",
    needs=("weights",),
    options={"keep": "share of the singular vectors that stay; 1 is the plain average"},
)
class Subspace(GroupFuser):
    """Blocks of columns, where the compared code mixes the experts' columns."""

    name = "subspace"

    def __init__(
        self, plan: ExpertPlan, stats: ExpertStats | None, *, model: Path, keep: float = 0.5
    ) -> None:
        super().__init__(plan, stats, model=model, keep=keep)
        self._keep = _share("keep", keep)

    def fuse(self, position: int, layer: int, members: list[Member]) -> ExpertWeights:
        return subspace_average(members, self._keep)


@register(
    KIND,
    "zip",
    title="Neurons of the whole group become one wherever their activations correlate",
    paper="ZipIt 2305.03053",
    needs=("weights", "data"),
    limits="Memory and time grow with the square of the group's neurons. Alignment is its own.",
)
class Zip(GroupFuser):
    """Activations on the sampled inputs of all members."""

    name = "zip"
    sets = ("inputs",)

    def fuse(self, position: int, layer: int, members: list[Member]) -> ExpertWeights:
        hidden = torch.cat([self.sample(position, member.id)[0] for member in members])
        if len(hidden) < 2:
            return average(members)
        middles = [self.middle(position, member.expert, hidden) for member in members]
        return zip_neurons(members, middles)


@register(
    KIND,
    "least-squares",
    title="Average, then the down projection refitted to what the members computed",
    paper="PLeaS 2407.02447",
    needs=("weights", "data"),
    limits="Merges every neuron (PLeaS's ratio 0), since the width stays. Fits on the sample.",
    options={
        "ridge": "how strongly the average holds, of the inputs' mean second moment",
        "reading": "gate and up: average, or regression (RegMean over the members' inputs)",
    },
)
class LeastSquares(GroupFuser):
    """Closed form; every member's outputs on its own tokens, weighted by their gates."""

    name = "least-squares"
    sets = ("inputs",)

    def __init__(
        self,
        plan: ExpertPlan,
        stats: ExpertStats | None,
        *,
        model: Path,
        ridge: float = RIDGE,
        reading: str = "average",
    ) -> None:
        super().__init__(plan, stats, model=model, ridge=ridge, reading=reading)
        if reading not in ("average", "regression"):
            raise UserError(f"reading {reading!r} is unknown; there are average and regression.")
        if ridge <= 0:
            raise UserError(f"ridge {ridge} must be above 0.")
        self._ridge, self._reading = ridge, reading

    def fuse(self, position: int, layer: int, members: list[Member]) -> ExpertWeights:
        samples = [self.sample(position, member.id) for member in members]
        if self._reading == "regression":
            moments = [hidden.double().T @ hidden.double() for hidden, _ in samples]
            start = regression_mean(members, moments, self._ridge)
        else:
            start = average(members)

        def targets() -> Any:
            for member, (hidden, gates) in zip(members, samples, strict=True):
                own = self.middle(position, member.expert, hidden)
                wanted = own @ member.expert.down.to(own.dtype).T
                if member.expert.down_bias is not None:
                    wanted = wanted + member.expert.down_bias.to(own.dtype)
                yield Target(self.middle(position, start, hidden), wanted, gates)

        return refit_down(start, targets(), self._ridge)


@register(
    KIND,
    "low-rank-sparse",
    title="Average, then every matrix as low rank plus the best rows of the residue",
    paper="MC-SMoE 2310.01334",
    needs=("weights", "data"),
    limits="One shot: the published method trains while it prunes the residue. Written expanded, "
    "so a stock checkpoint does not shrink by it.",
    options={
        "rank": "rank of the factors",
        "keep": "share of the residue's rows that stay",
        "information": "weigh the residue by Fisher information (set fisher)",
    },
)
class LowRankSparse(GroupFuser):
    """Also for lone experts: every expert of the result is factorised."""

    name = "low-rank-sparse"

    def __init__(
        self,
        plan: ExpertPlan,
        stats: ExpertStats | None,
        *,
        model: Path,
        rank: int = 32,
        keep: float = 0.1,
        information: bool = False,
    ) -> None:
        super().__init__(plan, stats, model=model, rank=rank, keep=keep, information=information)
        if rank < 1:
            raise UserError(f"rank {rank} must be at least 1.")
        self._rank, self._keep, self._information = rank, _share("keep", keep, 0.0), information

    def expert(
        self, layer: int, expert: int, members: Mapping[int, float], read: Read
    ) -> ExpertWeights:
        """See `Rewrite.expert`."""
        group = [Member(share, read(e), e) for e, share in members.items()]
        return self.fuse(self._position[layer], layer, group)

    def fuse(self, position: int, layer: int, members: list[Member]) -> ExpertWeights:
        merged = average(members)
        information = None
        if self._information:
            held = self.statistic(position, "neuron_fisher")
            total = torch.stack([self.in_order(layer, m.id, held[m.id]) for m in members]).sum(0)
            information = from_rows(total, merged)
        return low_rank_sparse(merged, self._rank, self._keep, information)


@register(
    KIND,
    "recombine",
    title="Neurons of dropped experts go to like ones, which are clustered back to the old width",
    paper="DERN 2509.10377",
    needs=("weights", "data"),
    limits="One layer's dropped experts are held in memory. For grouping `drop`; in larger groups "
    "their average receives.",
    options={
        "tau": "least cosine of two neurons that counts as alike",
        "use_gate": "compare gate rows too",
    },
)
class Recombine(GroupFuser):
    """Every kept expert gets the segments that it owns."""

    name = "recombine"

    def __init__(
        self,
        plan: ExpertPlan,
        stats: ExpertStats | None,
        *,
        model: Path,
        tau: float = TAU,
        use_gate: bool = False,
    ) -> None:
        super().__init__(plan, stats, model=model, tau=tau, use_gate=use_gate)
        self._tau, self._use_gate = tau, use_gate
        self._owners: tuple[int, dict[int, Owners]] = (-1, {})

    def expert(
        self, layer: int, expert: int, members: Mapping[int, float], read: Read
    ) -> ExpertWeights:
        """See `Rewrite.expert`."""
        start = average([Member(share, read(e), e) for e, share in members.items()])
        position = self._position[layer]
        importance = self.stats.saliency_sum(position, gate=1)
        width = start.down.shape[1]
        rows, weights = [], []
        for source, owned in self._owned(layer, read).items():
            mine = owned.expert == expert
            rows.append(neuron_rows(read(source))[mine])
            weights.append(torch.full((int(mine.sum()),), float(importance[source]) / width))
        if not rows:
            return start
        own = float(sum(importance[e] for e in members)) / width
        return recombine(start, own, torch.cat(rows), torch.cat(weights), self._tau)

    def _owned(self, layer: int, read: Read) -> dict[int, Owners]:
        if self._owners[0] != layer:
            plan, position = self.plan, self._position[layer]
            number = self.stats.layers[position].num_experts
            kept, gone = plan.survivors(layer, number), plan.dropped(layer)
            found = owners(kept, gone, read, self._tau, self._use_gate)
            self._owners = (layer, found)
        return self._owners[1]


def _share(name: str, value: float, least: float = 1e-9) -> float:
    if not least <= value <= 1:
        raise UserError(f"{name} {value} must be a share of 1, above 0.")
    return value
