"""From a rank, a share of the numbers, or a share of the energy to a plan that factorises."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moekit.compress.condense.model_experts import ModelExperts
from moekit.compress.factorize.factorizers import (
    KIND,
    WHITE_SET,
    check_settings,
    neighbours,
)
from moekit.compress.factorize.latent import Shape, rank_for_ratio, stored_numbers
from moekit.core.errors import UserError
from moekit.core.plan import Action, ExpertPlan, Fingerprint, Fit
from moekit.core.registry import registry
from moekit.core.spec import LayerSpec, MoESpec
from moekit.core.stats import ExpertStats
from moekit.ops.lowrank import rank_for, whitener

SETTINGS: dict[str, Any] = {"group": 1, "down": "private", "white": False, "first_rank": 0}


@dataclass(frozen=True)
class FactorizeRequest:
    """A registered factorisation, its options, and how far: exactly one of three measures.

    `rank` is that of every projection; `ratio` the share of the experts' numbers that their factors
    save; `energy` the share of the squared singular values that stays, in the norm of the method,
    which gives every layer a rank of its own.
    """

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    rank: int | None = None
    ratio: float | None = None
    energy: float | None = None

    def __post_init__(self) -> None:
        given = {"--rank": self.rank, "--ratio": self.ratio, "--energy": self.energy}
        named = [name for name, value in given.items() if value is not None]
        if len(named) != 1:
            raise UserError(
                f"give one of {', '.join(given)}, not {' and '.join(named) if named else 'none'}"
            )
        for name, value in (("--ratio", self.ratio), ("--energy", self.energy)):
            if value is not None and not 0 <= value <= 1:
                raise UserError(f"{name} {value:g} is a share: from 0 to 1")
        unknown = sorted(set(self.options) - set(SETTINGS))
        if unknown:
            raise UserError(
                f"--method {self.method} has no option {unknown[0]!r}; there are "
                f"{', '.join(SETTINGS)}"
            )
        settings = self.settings
        check_settings(**{name: settings[name] for name in ("group", "down", "first_rank")})

    @property
    def settings(self) -> dict[str, Any]:
        """The method's settings with the request's own options."""
        return {**SETTINGS, **registry.find(self.method, kind=KIND).settings, **self.options}

    def sets(self) -> list[str]:
        """The sets of `moekit profile` that the method needs; none without whitening."""
        return [WHITE_SET] if self.settings["white"] else []


def factorize_plan(
    spec: MoESpec,
    request: FactorizeRequest,
    experts: ModelExperts | None = None,
    stats: ExpertStats | None = None,
    *,
    stats_path: str | None = None,
) -> ExpertPlan:
    """The plan that gives every expert its rank; a rank that saves nothing is left out.

    `experts` are read for `energy` alone. Raises `UserError` for a ratio that the method cannot
    reach.
    """
    layers = {}
    for position, layer in enumerate(spec.per_layer):
        rank = _rank(position, layer, request, experts, stats)
        if rank is not None and rank < layer.hidden_size:
            layers[layer.layer_index] = {e: Action(rank=rank) for e in range(layer.num_experts)}
    fit = Fit(request.method, stats_path, dict(request.options))
    note = f"factorize: {request.method}"
    return ExpertPlan(layers, Fingerprint.of(spec), note, fit=fit)


def stored_share(spec: MoESpec, plan: ExpertPlan, request: FactorizeRequest) -> float:
    """Numbers of all routed experts as factors over those of the matrices, without biases."""
    kept = total = 0
    settings = request.settings
    for layer in spec.per_layer:
        whole = (3 if layer.has_gate else 2) * layer.hidden_size * layer.expert_width
        total += whole * layer.num_experts
        rank = plan.action(layer.layer_index, 0).rank
        if rank is None:
            kept += whole * layer.num_experts
            continue
        shape = Shape(rank, settings["down"])
        size = settings["group"] or layer.num_experts
        for first in range(0, layer.num_experts, size):
            number = min(size, layer.num_experts - first)
            kept += stored_numbers(
                layer.hidden_size, layer.expert_width, number, layer.has_gate, shape
            )
    return kept / total


def _rank(
    position: int,
    layer: LayerSpec,
    request: FactorizeRequest,
    experts: ModelExperts | None,
    stats: ExpertStats | None,
) -> int | None:
    settings = request.settings
    if request.rank is not None:
        if not 1 <= request.rank <= layer.hidden_size:
            raise UserError(
                f"--rank {request.rank} is outside of 1 to {layer.hidden_size}, the width of layer "
                f"{layer.layer_index}"
            )
        return request.rank
    size = min(settings["group"] or layer.num_experts, layer.num_experts)
    if request.ratio is not None:
        if request.ratio == 0:
            return None
        sizes = (layer.hidden_size, layer.expert_width, size, layer.has_gate)
        rank = rank_for_ratio(*sizes, settings["down"], request.ratio)
        if rank is None:
            raise UserError(
                f"--ratio {request.ratio:g} is out of reach for {request.method} (down is "
                f"{settings['down']}, groups of {size}); at rank 1 it saves "
                f"{1 - _share_at(layer, size, settings['down'], 1):.3f}"
            )
        return rank
    assert request.energy is not None
    assert experts is not None
    found = []
    for first in range(0, layer.num_experts, size):
        group = neighbours(range(layer.num_experts), first, size)
        squares = _spectrum(position, group, settings, experts, stats)
        found.append(rank_for(squares, request.energy))
    return max(found)


def _share_at(layer: LayerSpec, size: int, down: str, rank: int) -> float:
    sizes = (layer.hidden_size, layer.expert_width, size, layer.has_gate)
    whole = (3 if layer.has_gate else 2) * size * layer.hidden_size * layer.expert_width
    return stored_numbers(*sizes, Shape(rank, down)) / whole


def _spectrum(
    position: int,
    group: list[int],
    settings: Mapping[str, Any],
    experts: ModelExperts,
    stats: ExpertStats | None,
) -> Tensor:
    """Squared singular values of what the group's projections cut, summed place by place."""
    held = [experts.read(position, e) for e in group]
    white = None
    if settings["white"]:
        assert stats is not None
        white = whitener(stats.get(position, "input_second")[group].double().sum(0))
    stacks = [
        torch.cat([getattr(e, name).double() for e in held])
        for name in ("gate", "up")
        if getattr(held[0], name) is not None
    ]
    if white is not None:
        stacks = [stack @ white.root for stack in stacks]
    if settings["down"] != "whole":
        downs = [e.down.double() for e in held]
        if white is not None:
            assert stats is not None
            moments = stats.get(position, "middle_second")
            downs = [d @ whitener(moments[e]).root for d, e in zip(downs, group, strict=True)]
        stacks.append(torch.cat([d.T for d in downs]))
    total = torch.zeros(max(min(s.shape) for s in stacks), dtype=torch.float64)
    for stack in stacks:
        squares = torch.linalg.svdvals(stack).square()
        total[: len(squares)] += squares
    return total
