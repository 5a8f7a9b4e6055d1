"""Experts and neurons of one MoE brought into the order of another's before both are merged.

Two trainings, or two conversions, of one architecture number their experts and neurons as they
like; merging by index then averages experts that have nothing to do with each other. Permuting the
experts with their router rows, and the neurons of an expert, changes nothing a model computes.
Shapes: E experts, F neurons of an expert, D width, P probes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from moekit.core.architecture import meta_model
from moekit.core.deferred import Deferred
from moekit.core.errors import UserError
from moekit.core.expert_source import ExpertSource, expert_sources
from moekit.core.expert_weights import ExpertWeights
from moekit.core.find import find_moe
from moekit.core.layer_spec import LayerSpec
from moekit.core.layout import ExpertAxis, expert_axes, layer_of, with_num_experts
from moekit.core.neurons import neuron_rows
from moekit.core.new_banks import NewBanks
from moekit.core.new_experts import select_neurons
from moekit.core.seeds import generator
from moekit.core.source_model import SourceModel
from moekit.core.spill import Spill
from moekit.core.view import MoEView
from moekit.ops.align import match, match_weights

PROBES = 32
# Below any sum of cosines, so that no expert leaves its group of the router.
BARRED = -1e6


def align_experts(source: SourceModel, reference: SourceModel, scratch: Path) -> SourceModel:
    """`source` with its experts and their neurons in the order of `reference`'s.

    Experts are matched by what they make of random inputs and by their router rows (Hungarian
    method), neurons inside matched pairs by their weights. Reads the experts of both models twice,
    one at a time; `scratch` is a directory for those of one layer. Raises `UserError` for models
    without experts and for those whose tokens choose experts by a table.
    """
    model = meta_model(source.config)
    sites = find_moe(model)
    if not sites:
        raise UserError(f"align: {source.name} has no experts; leave align out.")
    layers = MoEView(model).layers
    most = max(layer.num_experts for layer in layers)
    axes = expert_axes(model, meta_model(with_num_experts(source.config, 2 * most)))
    theirs = expert_sources(_deferred(reference), reference.config)
    mine = expert_sources(_deferred(source), source.config)
    banks = {name for layer in mine for name in layer.names}
    router = {name: axis for name, axis in axes.items() if name not in banks}
    made: dict[str, Any] = dict(source.tensors)
    spill = Spill(scratch)
    for site, view, own, other in zip(sites, layers, mine, theirs, strict=True):
        rows = {n: a for n, a in router.items() if layer_of(n, {own.spec.path: 0}) == 0}
        order = _experts_order(source, own, reference, other, rows)
        make = _Reordered(own, other, order)
        found = NewBanks(own, site, view, order, make, spill, source.tensors).tensors()
        made.update(found)
        for name, axis in rows.items():
            tensor: Any = source.tensors[name]
            entries = axis.entries(order, len(order), tensor.shape[axis.axis])
            made[name] = tensor.index_select(axis.axis, torch.tensor(entries))
    return replace(source, tensors=made)


class _Reordered:
    """An expert of `source` with its neurons in the order of its partner's in `reference`."""

    def __init__(self, source: ExpertSource, reference: ExpertSource, order: list[int]) -> None:
        self._source, self._reference = source, reference
        self._partner = {expert: place for place, expert in enumerate(order)}

    def __call__(self, expert: int) -> ExpertWeights:
        own = self._source.read(expert)
        partner = self._reference.read(self._partner[expert])
        return select_neurons(own, match_weights(neuron_rows(partner), neuron_rows(own)))


def _experts_order(
    source: SourceModel,
    own: ExpertSource,
    reference: SourceModel,
    other: ExpertSource,
    router: Mapping[str, ExpertAxis],
) -> list[int]:
    """For each place of the reference the expert of the source that comes there."""
    spec = own.spec
    if spec.selection == "hash":
        raise UserError(f"align: {spec.path} chooses experts by a table of tokens.")
    if spec.num_experts != other.spec.num_experts:
        raise UserError(
            f"align: {spec.path} has {spec.num_experts} experts in {source.name} and "
            f"{other.spec.num_experts} in {reference.name}."
        )
    similar = _signatures(other) @ _signatures(own).T
    for name, axis in router.items():
        first, second = (_router_rows(s.tensors[name], axis, spec) for s in (reference, source))
        if first.shape[1] > 1:
            similar += normalize(first) @ normalize(second).T
    if spec.num_groups > 1:
        group = torch.arange(spec.num_experts) // (spec.num_experts // spec.num_groups)
        similar = similar.masked_fill(group[:, None] != group, BARRED)
    return [int(expert) for expert in match(similar)]


def _signatures(source: ExpertSource) -> Tensor:
    """What each expert makes of the probes, but for its activation, as unit vectors [E, P * D].

    The order of its neurons does not matter to it.
    """
    draw = generator(0, "probes of experts")
    probes = torch.randn(PROBES, source.spec.hidden_size, generator=draw)
    found = []
    for number in range(source.spec.num_experts):
        expert = source.read(number)
        inputs = [part.float() for part in (expert.gate, expert.up) if part is not None]
        hidden = probes @ inputs[0].T
        # With one matrix in front its products would be linear in the probes: squares are not.
        hidden = hidden * (probes @ inputs[-1].T)
        found.append((hidden @ expert.down.float().T).flatten())
    return normalize(torch.stack(found))


def _router_rows(tensor: Any, axis: ExpertAxis, spec: LayerSpec) -> Tensor:
    """The entries of each expert, [E, numbers]."""
    moved = tensor.read().float().movedim(axis.axis, 0)
    return moved[: spec.num_experts * axis.block].reshape(spec.num_experts, -1)


def _deferred(source: SourceModel) -> dict[str, Deferred]:
    return dict(source.tensors)
