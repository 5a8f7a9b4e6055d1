"""Banks of new experts, in the storage of their family, computed when their rows are read.

Shapes: E experts after the plan; a bank holds `block` rows for each of them on its first axis.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moekit.core.deferred import Deferred, Region
from moekit.core.expert_source import ExpertSource, bank_names, replace_parameter
from moekit.core.expert_weights import ExpertWeights, copy_into
from moekit.core.find import MoESite
from moekit.core.layer import MoELayer
from moekit.core.layer_spec import bank_block
from moekit.core.new_experts import pad_width, width_of
from moekit.core.spill import Spill

Make = Callable[[int], ExpertWeights]


class NewBanks:
    """The expert tensors of one MoE layer of the resulting model.

    `slots` are the original ids of the resulting experts; an id that occurs twice is computed once,
    None is an expert of zeros.
    `make(id)` computes a dense expert, which is padded with zeros to the layer's width. The rows
    of an expert are made together and wait in `spill` for the banks that are written later.
    `stored` are the tensors of the original model, by the same names.
    """

    def __init__(
        self,
        source: ExpertSource,
        site: MoESite,
        layer: MoELayer,
        slots: Sequence[int | None],
        make: Make,
        spill: Spill,
        stored: Mapping[str, Deferred],
    ) -> None:
        self._source = source
        self._layer = layer
        self._slots = slots
        self._make = make
        self._spill = spill
        self._block = bank_block(site)
        self._names = bank_names(site)
        self._stored = stored
        self._dtypes = {full: stored[full].dtype for _, full in self._names}
        self._shapes = {full: site.experts.get_parameter(name).shape for name, full in self._names}

    def tensors(self) -> dict[str, Deferred]:
        """Every bank by name."""
        made = {}
        for _, name in self._names:
            own = len(self._slots) * self._block
            shape = self._shapes[name]
            dtype = self._dtypes[name]
            bank = Deferred((own, *shape[1:]), dtype, self._reader(name))
            if shape[0] > own:
                rest = self._rest(name, shape[0] - own)
                bank = torch.cat([bank, rest])  # type: ignore[assignment]
            made[name] = bank
        return made

    def _rest(self, name: str, count: int) -> Deferred:
        """Rows behind those of the experts, which belong to none and are not used."""
        stored, shape = self._stored[name], self._shapes[name]
        if stored.shape[1:] == shape[1:] and len(stored) >= count:
            rows: Any = stored[len(stored) - count :]
            return rows
        return Deferred((count, *shape[1:]), stored.dtype, _zeros(stored.dtype))

    def _reader(self, name: str) -> Callable[[Region], Tensor]:
        def read(region: Region) -> Tensor:
            (start, stop), *rest = region
            first, last = start // self._block, -(-stop // self._block)
            inner = tuple(slice(a, b) for a, b in rest)
            rows = [self._rows(slot, name)[(slice(None), *inner)] for slot in range(first, last)]
            if not rows:
                return torch.empty([b - a for a, b in region], dtype=self._dtypes[name])
            offset = first * self._block
            return torch.cat(rows)[start - offset : stop - offset]

        return read

    def _rows(self, slot: int, name: str) -> Tensor:
        """The rows [block, ...] of one resulting expert in a bank."""
        expert = self._slots[slot]
        if expert is None:
            shape = (self._block, *self._shapes[name][1:])
            return torch.zeros(shape, dtype=self._dtypes[name])
        kept = self._spill.get(self._source.spec.path, expert, name)
        if kept is not None:
            return kept
        rows = self._as_rows(self._make(expert))
        self._spill.put(self._source.spec.path, expert, rows)
        return rows[name]

    def _as_rows(self, expert: ExpertWeights) -> dict[str, Tensor]:
        # A bank of a single expert, seen through the family's own view of it.
        banks = {}
        for name, full in self._names:
            shape = (self._block, *self._shapes[full][1:])
            banks[full] = torch.zeros(shape, dtype=self._dtypes[full])
            replace_parameter(self._layer.experts, name, banks[full])
        views = self._layer.expert_views(0)
        copy_into(views, pad_width(expert, width_of(views)), self._layer.name)
        return banks


def _zeros(dtype: torch.dtype) -> Callable[[Region], Tensor]:
    return lambda region: torch.zeros([b - a for a, b in region], dtype=dtype)
