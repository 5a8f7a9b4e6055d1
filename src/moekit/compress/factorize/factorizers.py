"""The registered factorisations: rows of settings over the kernel in `latent`.

E experts of a layer, Q of a group, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from moekit.compress.factorize.latent import GroupFactors, Shape, group_factors, stored_parts
from moekit.core.errors import UserError
from moekit.core.expert_weights import ExpertWeights
from moekit.core.plan import ExpertPlan
from moekit.core.registry import register_preset
from moekit.core.rewrite import Read, Rewrite
from moekit.core.stats import ExpertStats
from moekit.ops.lowrank import Whitener, whitener

KIND = "factorizer"
DOWNS = ("whole", "private", "shared")
# The set of `moekit profile` with the second moments that whitening needs.
WHITE_SET = "full"


class Factorizer(Rewrite):
    """Every expert as its factors multiplied out again, at the rank that the plan gives it.

    Experts share their projections in groups of `group` neighbours (0: all of a layer). `down` is
    whole, private or shared; `white` weighs errors by the experts' inputs; `first_rank` truncates
    every matrix before (0: not). See `latent`.
    """

    def __init__(
        self,
        plan: ExpertPlan,
        stats: ExpertStats | None,
        *,
        model: Path,
        group: int = 1,
        down: str = "private",
        white: bool = False,
        first_rank: int = 0,
    ) -> None:
        check_settings(group=group, down=down, first_rank=first_rank)
        if white and stats is None:
            raise UserError("whitening needs the statistics it was planned with; give --stats.")
        self._plan, self._stats = plan, stats
        self._group, self._down, self._white = group, down, white
        self._first_rank = first_rank or None
        self._position = {} if stats is None else {s.index: p for p, s in enumerate(stats.layers)}
        self._held: tuple[tuple[int, int, int], GroupFactors] | None = None
        self._read: tuple[int, dict[str, Tensor]] = (-1, {})
        self.identity = {
            "factorizer": [group, down, white, first_rank],
            "stats": stats.digest() if white and stats is not None else None,
        }

    def expert(
        self, layer: int, expert: int, members: Mapping[int, float], read: Read
    ) -> ExpertWeights:
        """See `Rewrite.expert`. Raises UserError for an expert that is folded of several."""
        if len(members) > 1:
            raise UserError(
                f"Layer {layer}: expert {expert} is folded of {sorted(members)}; write the merged "
                "model first, then factorise it."
            )
        rank = self._plan.action(layer, expert).rank
        if rank is None:
            return read(expert)
        factors = self._factors(layer, expert, rank, read)
        white = self._whiteners(layer, "middle_second", [expert]) if self._white else None
        return factors.expand(read(expert), None if white is None else white[0])

    def group_size(self, experts: int) -> int:
        """Experts of a group in a layer of so many."""
        return min(self._group or experts, experts)

    def parts(self, layer: int, first: int, read: Read) -> dict[str, Tensor]:
        """The group that begins with expert `first` as factors, by name; see `store`."""
        assert self._plan.model is not None
        group = neighbours(range(self._plan.model.experts_in(layer) or 0), first, self._group)
        rank = self._plan.action(layer, first).rank
        factors = None if rank is None else self._factors(layer, first, rank, read)
        found: dict[str, Tensor] = {}
        for e in group:
            white = None
            if self._white and self._down == "private" and factors is not None:
                white = self._whiteners(layer, "middle_second", [e])[0]
            expert = read(e)
            for name, tensor in stored_parts(expert, factors, white).items():
                shared = name.endswith(".right") and self._group != 1
                key = f"g{first}.{name}" if name.endswith(".right") else f"{e}.{name}"
                if not shared or key not in found:
                    found[key] = tensor.to(expert.down.dtype).contiguous()
        return found

    def _factors(self, layer: int, expert: int, rank: int, read: Read) -> GroupFactors:
        """Those of the expert's group, kept until another group is asked for."""
        assert self._plan.model is not None
        number = self._plan.model.experts_in(layer) or 0
        survivors = self._plan.survivors(layer, number)
        group = neighbours(survivors, expert, self._group)
        key = (layer, group[0], rank)
        if self._held is None or self._held[0] != key:
            shape = Shape(rank, self._down, self._first_rank)
            white, white_down = None, None
            if self._white:
                white = whitener(self._moments(layer, "input_second")[group].double().sum(0))
                if self._down == "shared":
                    white_down = self._whiteners(layer, "middle_second", group)
            experts = [read(e) for e in group]
            self._held = (key, group_factors(experts, shape, white, white_down))
        return self._held[1]

    def _whiteners(self, layer: int, name: str, experts: Sequence[int]) -> list[Whitener]:
        moments = self._moments(layer, name)
        return [whitener(moments[e]) for e in experts]

    def _moments(self, layer: int, name: str) -> Tensor:
        """Second moments of a layer, kept until another layer is asked for."""
        assert self._stats is not None
        if self._read[0] != layer:
            self._read = (layer, {})
        if name not in self._read[1]:
            self._read[1][name] = self._stats.get(self._position[layer], name)
        return self._read[1][name]


def neighbours(survivors: Sequence[int], expert: int, size: int) -> list[int]:
    """The group of an expert among neighbours of `size` (0: all)."""
    size = size or len(survivors)
    first = list(survivors).index(expert) // size * size
    return list(survivors[first : first + size])


def check_settings(*, group: int, down: str, first_rank: int) -> None:
    """Raise UserError for settings that mean nothing."""
    if group < 0 or first_rank < 0:
        raise UserError(f"group {group} and first_rank {first_rank} must not be negative.")
    if down not in DOWNS:
        raise UserError(f"down {down!r} is unknown; there are {', '.join(DOWNS)}.")
    if group != 1 and down == "private":
        raise UserError("down private is for group 1; of a group take whole or shared.")


_LATENT = "Mixture of Latent Experts 2503.23100"
# name: title, paper, needs, settings
METHODS: dict[str, tuple[str, str, tuple[str, ...], dict[str, Any]]] = {
    "svd": (
        "Truncated SVD of every matrix",
        "",
        ("weights",),
        {"group": 1, "down": "private"},
    ),
    "svd-white": (
        "Truncated SVD of every matrix in the norm of its outputs",
        "SVD-LLM 2403.07378",
        ("weights", "data"),
        {"group": 1, "down": "private", "white": True},
    ),
    "mole": (
        "Gate and up as a private factor times a projection that 8 neighbours share",
        _LATENT,
        ("weights",),
        {"group": 8, "down": "whole"},
    ),
    "molae": (
        "As mole, and down with a shared factor on its other side",
        _LATENT,
        ("weights",),
        {"group": 8, "down": "shared"},
    ),
    "molae-white": (
        "As molae, in the norm of the outputs on the group's inputs",
        _LATENT,
        ("weights", "data"),
        {"group": 8, "down": "shared", "white": True},
    ),
    "shared-basis": (
        "One projection a matrix kind for all experts of a layer",
        _LATENT,
        ("weights",),
        {"group": 0, "down": "shared"},
    ),
    "shared-basis-white": (
        "As shared-basis, in the norm of the outputs",
        _LATENT,
        ("weights", "data"),
        {"group": 0, "down": "shared", "white": True},
    ),
}

for _name, (_title, _paper, _needs, _settings) in METHODS.items():
    register_preset(
        Factorizer,
        _name,
        kind=KIND,
        title=_title,
        paper=_paper,
        needs=_needs,
        limits="No stock class holds the factors: written expanded, or for moekit alone.",
        settings=_settings,
    )
