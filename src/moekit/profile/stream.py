"""A model larger than memory: its own forward, with weights read from disk when a layer runs.

The model is built on the meta device. Hooks put the weights of a decoder layer in place before its
forward and take them away after it, so whatever a family passes from layer to layer stays as it
is. A large batch is what makes this affordable, since every batch reads the whole checkpoint once.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from moekit.core.architecture import read_config
from moekit.core.checkpoint import Checkpoint, read_json
from moekit.core.deferred import Deferred
from moekit.core.dequant import dequantize, quantization_of
from moekit.core.errors import UserError
from moekit.core.layer import MoELayer
from moekit.core.layout import deferred_tensors, to_model
from moekit.core.memory import format_bytes
from moekit.core.skeleton import config_dtype, skeleton, weight_dtypes
from moekit.core.view import MoEView
from moekit.profile.experts_run import runs_choices

BANKS = ("gate_up_proj", "up_proj", "down_proj")
# Of a memory limit, what the weights at hand may take; the rest is for activations and sums.
WEIGHT_SHARE = 0.5
# Sequences in a batch: without a limit, and with any.
DEFAULT_BATCH, MAX_BATCH = 32, 512
# Vectors of the model's width that a token needs at one time, generously.
ACTIVATIONS = 16


@dataclass
class _Slot:
    """One parameter or persistent buffer: where it belongs and what is read into it."""

    owner: nn.Module
    name: str
    source: Deferred
    dtype: torch.dtype
    rest: Tensor

    @property
    def nbytes(self) -> int:
        return self.rest.numel() * self.dtype.itemsize

    def read(self, device: torch.device) -> Tensor:
        value = torch.empty(self.rest.shape, dtype=self.dtype, device=device)
        for row, piece in self.source.pieces():
            if value.ndim == 0:
                value.copy_(piece)
            else:
                value[row : row + len(piece)] = piece.to(self.dtype)
        return value

    def put(self, value: Tensor) -> None:
        if self.name in self.owner._parameters:
            # torch.matmul picks its algorithm by requires_grad, even without gradients.
            parameter = nn.Parameter(value, requires_grad=self.rest.requires_grad)
            self.owner._parameters[self.name] = parameter
        else:
            self.owner._buffers[self.name] = value

    def take_away(self) -> None:
        held = (
            self.owner._parameters if self.name in self.owner._parameters else self.owner._buffers
        )
        held[self.name] = self.rest  # type: ignore[assignment]


class Bank:
    """Stands for a bank of experts [E, ...]; indexing reads one expert from disk."""

    def __init__(self, slot: _Slot, device: torch.device):
        self._slot, self._device = slot, device
        self.shape = slot.rest.shape

    def __getitem__(self, e: int) -> Tensor:
        value = torch.empty(self.shape[1:], dtype=self._slot.dtype, device=self._device)
        value.copy_(self._slot.source.rows(e, e + 1)[0])
        return value


@dataclass
class _Unit:
    """What is read together: a decoder layer, or a large module outside of them."""

    module: nn.Module
    slots: list[_Slot] = field(default_factory=list)
    banks: list[_Slot] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return sum(slot.nbytes for slot in self.slots)


class StreamedModel:
    """The model in `directory` with its weights on disk, ready for `profile(streamed.view, ...)`.

    `memory` is the limit in bytes that the process should keep; half of it is for weights. Where a
    layer does not fit its experts are read one at a time (`by_expert`), which can also be asked
    for. The arithmetic is that of the model in memory. Use as a context manager.

    Raises UserError for a damaged checkpoint, and where even single experts do not fit.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        dtype: torch.dtype | None = None,
        memory: int | None = None,
        by_expert: bool = False,
        device: str | torch.device = "cpu",
    ):
        self._device = torch.device(device)
        self._checkpoint = Checkpoint(directory)
        config = read_config(self._checkpoint.directory)
        stored = deferred_tensors(self._checkpoint)
        quantization = quantization_of(read_json(self._checkpoint.directory / "config.json"))
        if quantization is not None:
            stored = dequantize(stored, quantization)
        number_format = dtype or _own_dtype(config, stored)
        self.model = skeleton(config, number_format, self._device)
        self.view = MoEView(self.model)
        tensors = to_model(stored, self.model).tensors
        units = _units(self.model, _slots(self.model, tensors, number_format), self._device)
        self.by_expert = by_expert
        room = None if memory is None else int(memory * WEIGHT_SHARE)
        if room is not None and not by_expert:
            self.by_expert = max(unit.nbytes for unit in units) > room
        if self.by_expert:
            _set_banks_apart(units, self.view)
        largest = max(unit.nbytes for unit in units)
        expert = max((s.nbytes // len(s.rest) for u in units for s in u.banks), default=0)
        # One expert's matrices are held together.
        self.weight_bytes = largest + 2 * expert
        if room is not None and self.weight_bytes > room:
            raise UserError(
                f"--memory {format_bytes(memory or 0)} is too small: at one time "
                f"{format_bytes(self.weight_bytes)} of weights are needed, and half of the limit "
                f"is for them; give at least {format_bytes(self.weight_bytes / WEIGHT_SHARE)}."
            )
        self.memory = memory
        self._handles = [handle for unit in units for handle in self._watch(unit)]

    def _watch(self, unit: _Unit) -> Iterator[Any]:
        def enter(module: nn.Module, args: Any) -> None:
            for slot in unit.slots:
                slot.put(slot.read(self._device))
            for slot in unit.banks:
                del slot.owner._parameters[slot.name]
                setattr(slot.owner, slot.name, Bank(slot, self._device))

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            for slot in unit.slots:
                slot.take_away()
            for slot in unit.banks:
                if slot.name in slot.owner.__dict__:
                    delattr(slot.owner, slot.name)
                    slot.owner.register_parameter(slot.name, slot.rest)  # type: ignore[arg-type]
            _give_back()

        if isinstance(unit.module, _Resident):
            enter(unit.module, ())
            return
        yield unit.module.register_forward_pre_hook(enter, prepend=True)
        # Also after an exception: a pass may end a forward once it has what it wants.
        yield unit.module.register_forward_hook(leave, always_call=True)

    def batch_size(self, seq_len: int) -> int:
        """Sequences of `seq_len` tokens in a batch whose activations fit beside the weights."""
        if self.memory is None:
            return DEFAULT_BATCH
        config = self.model.config.get_text_config(decoder=True)
        width = max(config.hidden_size, getattr(config, "intermediate_size", None) or 0)
        token = ACTIVATIONS * width * torch.float32.itemsize
        room = self.memory * (1 - WEIGHT_SHARE) / 2
        return max(1, min(MAX_BATCH, int(room / (token * seq_len))))

    def close(self) -> None:
        """Remove the hooks and close the files."""
        for handle in self._handles:
            handle.remove()
        self._checkpoint.close()

    def __enter__(self) -> StreamedModel:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()


def _give_back() -> None:
    """Return freed memory to the system: glibc keeps blocks of up to 32 MB, layer after layer."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class _Resident(nn.Module):
    """Stands for all modules outside of layers whose weights are small and stay."""


def _own_dtype(config: PretrainedConfig, stored: dict[str, Deferred]) -> torch.dtype:
    """The config's number format, else that of the first weights, as `from_pretrained` does."""
    named = config_dtype(config)
    if named is not None:
        return named
    return next((t.dtype for t in stored.values() if t.dtype.is_floating_point), torch.float32)


def _slots(
    model: PreTrainedModel, tensors: dict[str, Deferred], dtype: torch.dtype
) -> dict[str, _Slot]:
    """Every parameter and persistent buffer by name, tied ones once for each of their names."""
    formats = weight_dtypes(model, dtype)
    expected = model.state_dict(keep_vars=True)
    names: dict[int, str] = {}
    for name in expected:
        if name in tensors:
            names[id(expected[name])] = name
    slots = {}
    for name, tensor in expected.items():
        owner, _, leaf = name.rpartition(".")
        source = tensors[names[id(tensor)]]
        slots[name] = _Slot(model.get_submodule(owner), leaf, source, formats[name], tensor)
    return slots


def _units(model: PreTrainedModel, slots: dict[str, _Slot], device: torch.device) -> list[_Unit]:
    units: dict[nn.Module, _Unit] = {}
    resident = _Unit(_Resident())
    for name, slot in slots.items():
        module = _layer_around(model, name)
        if module is None and isinstance(slot.owner, nn.Linear | nn.Embedding):
            module = slot.owner
            slot.rest = _stand_in(slot.rest, device)
            slot.take_away()
        unit = resident if module is None else units.setdefault(module, _Unit(module))
        unit.slots.append(slot)
    return [resident, *units.values()]


def _stand_in(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of this shape that takes no memory and yet tells a real device.

    Some families move token ids to wherever the embedding is, and indexing with ids on the meta
    device gives values from nowhere.
    """
    value = torch.full((1,), float("nan"), dtype=tensor.dtype, device=device)
    value = value.expand(tensor.shape)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(value, requires_grad=tensor.requires_grad)
    return value


def _layer_around(model: nn.Module, name: str) -> nn.Module | None:
    """The outermost module of a list (a decoder layer) that holds the tensor `name`."""
    module: nn.Module = model
    for part in name.split(".")[:-1]:
        inside_list = isinstance(module, nn.ModuleList)
        module = getattr(module, part)
        if inside_list and not isinstance(module, nn.ModuleList | nn.ModuleDict):
            return module
    return None


def _set_banks_apart(units: list[_Unit], view: MoEView) -> None:
    banks = {
        (layer.experts, name)
        for layer in view
        if isinstance(layer, MoELayer) and not runs_choices(layer)
        for name in BANKS
    }
    for unit in units:
        unit.banks = [slot for slot in unit.slots if (slot.owner, slot.name) in banks]
        unit.slots = [slot for slot in unit.slots if (slot.owner, slot.name) not in banks]
