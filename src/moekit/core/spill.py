"""Tensors that are made together but needed one after the other, kept on disk in between."""

from __future__ import annotations

import tempfile
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moekit.core.errors import UserError


class Spill:
    """Keeps named tensors by key until tensors of another group are put.

    They lie in a file of `directory` that has no name, so nothing is left behind whatever happens.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._file: Any = None
        self._group: Hashable = None
        self._kept: dict[Hashable, dict[str, tuple[int, torch.Size, torch.dtype]]] = {}

    def get(self, group: Hashable, key: Hashable, name: str) -> Tensor | None:
        """One of the tensors put under a key, or None."""
        if group != self._group or key not in self._kept:
            return None
        offset, shape, dtype = self._kept[key][name]
        self._file.seek(offset)
        data = bytearray(shape.numel() * dtype.itemsize)
        self._file.readinto(data)
        return torch.frombuffer(data, dtype=dtype).view(shape)

    def put(self, group: Hashable, key: Hashable, tensors: Mapping[str, Tensor]) -> None:
        """Keep `tensors`; raises `UserError` where the disk has no room."""
        try:
            self._put(group, key, tensors)
        except OSError as error:
            raise UserError(
                f"{self._directory}: no room for the experts of one layer ({error.strerror})."
            ) from None

    def _put(self, group: Hashable, key: Hashable, tensors: Mapping[str, Tensor]) -> None:
        if self._file is None:
            self._directory.mkdir(parents=True, exist_ok=True)
            # Closed, and with it gone, when the spill is.
            self._file = tempfile.TemporaryFile(dir=self._directory)  # noqa: SIM115
        if group != self._group:
            self._file.truncate(0)
            self._group, self._kept = group, {}
        offset = self._file.seek(0, 2)
        entry = {}
        for name, tensor in tensors.items():
            data = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
            self._file.write(data)
            entry[name] = (offset, tensor.shape, tensor.dtype)
            offset += len(data)
        self._kept[key] = entry
