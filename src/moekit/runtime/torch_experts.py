"""Experts decoded into one working set of matrices and run by their family's own rule.

Works for every family and codec. Shapes: T tokens, K chosen, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moekit.core.expert_weights import ExpertWeights
from moekit.core.find import MoESite
from moekit.core.layer import MoELayer
from moekit.core.packed import ExpertParts, PackedLayer, read_parts
from moekit.runtime.resident import expert_parameters


class TorchExperts:
    """One layer whose bank holds a single expert: that which was decoded last.

    Layers of one shape share the matrices in `banks`.
    """

    def __init__(
        self, layer: MoELayer, site: MoESite, packed: PackedLayer, banks: dict[Any, Tensor]
    ) -> None:
        self._num_experts = layer.num_experts
        self._packed = packed
        self._layer = copy.copy(layer)
        self._layer.experts = _shadow(layer.experts)
        if layer.block is layer.experts:
            self._layer.block = self._layer.experts
        for name, parameter in expert_parameters(site).items():
            shape = _one_expert(parameter.shape, layer.num_experts)
            key = (name, shape, parameter.dtype)
            bank = banks.setdefault(key, torch.empty(shape, dtype=parameter.dtype))
            owner, _, leaf = name.rpartition(".")
            module = self._layer.experts.get_submodule(owner)
            module._parameters[leaf] = nn.Parameter(bank, requires_grad=False)

    def start(
        self, hidden: Tensor, ids: Tensor, weights: Tensor, sizes: Sequence[int] | None = None
    ) -> TorchCall:
        """Begin one call of the layer's experts: hidden [T, D], ids and weights [T, K].

        `sizes` are the numbers of tokens that belong together (default: all): others do not share a
        product with them, since what torch gives may depend on how many rows there are.
        """
        call = TorchCall(self, hidden, ids, weights, sizes or [len(hidden)])
        # What runs without a record: identity experts.
        for expert in sorted({e for e in ids.flatten().tolist() if e >= self._num_experts}):
            call.add(expert)
        return call

    def load(self, expert: int, record: Tensor) -> None:
        """Decode the record of an expert into the bank."""
        pieces, start = [], 0
        for plane in range(self._packed.num_planes(expert)):
            size = self._packed.record(expert, plane).size
            pieces.append(record[start : start + size])
            start += size
        self._layer.set_expert(0, decoded(read_parts(self._packed, expert, pieces)))

    def run(self, expert: int, hidden: Tensor, weights: Tensor) -> Tensor:
        """The weighted output of the expert in the bank, or of one that has no weights."""
        number = 0 if expert < self._num_experts else expert
        return self._layer.run_expert(number, hidden, weights)


class TorchCall:
    """The contributions [T, K, D] of one call, each in its place whatever came first."""

    def __init__(
        self,
        experts: TorchExperts,
        hidden: Tensor,
        ids: Tensor,
        weights: Tensor,
        sizes: Sequence[int],
    ) -> None:
        self._experts, self._sizes = experts, sizes
        self._hidden, self._ids, self._weights = hidden, ids, weights
        self._parts = torch.zeros(*ids.shape, hidden.shape[1])

    def run(self, records: dict[int, Tensor]) -> None:
        """Compute some of the chosen experts from their records."""
        for expert, record in records.items():
            self._experts.load(expert, record)
            self.add(expert)

    def add(self, expert: int) -> None:
        start = 0
        for ids in self._ids.split(list(self._sizes)):
            tokens, choices = (ids == expert).nonzero(as_tuple=True)
            tokens, start = tokens + start, start + len(ids)
            if len(tokens) == 0:
                continue
            weights = self._weights[tokens, choices].unsqueeze(1)
            out = self._experts.run(expert, self._hidden[tokens], weights)
            self._parts[tokens, choices] = out.float()

    def result(self) -> Tensor:
        """The sum over the choices, [T, D]."""
        return self._parts.sum(dim=1).to(self._hidden.dtype)


def decoded(parts: ExpertParts) -> ExpertWeights:
    """The matrices of an expert in float32, and its biases as stored."""
    matrices = {name: parts.codec.decode(matrix) for name, matrix in parts.matrices.items()}
    weights: dict[str, Any] = {"gate": None, "up": None, **matrices, **parts.vectors}
    return ExpertWeights(**weights)


def _shadow(module: nn.Module) -> nn.Module:
    """A module tree of its own that shares all tensors; the original stays as it is."""
    made = copy.copy(module)
    made._parameters = dict(module._parameters)
    made._modules = {name: m and _shadow(m) for name, m in module._modules.items()}
    return made


def _one_expert(shape: Iterable[int], num_experts: int) -> tuple[int, ...]:
    first, *rest = shape
    # A matrix of more rows has those of all experts one below the other.
    rows = first // num_experts if len(rest) == 1 and first % num_experts == 0 else 1
    return (rows, *rest)
