"""Laying out safetensors shards before any tensor exists: which file, which byte."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moekit.core.checkpoint import DTYPE_NAMES, SINGLE_FILE, TensorInfo

MODEL = SINGLE_FILE.removesuffix(".safetensors")
# Loaders map the file; tensors that start on a cache line suit vector instructions.
CACHE_LINE = 64


@dataclass(frozen=True)
class Shard:
    """One file: its name, header bytes, absolute offset of each tensor, and size in bytes."""

    file: str
    header: bytes
    offsets: dict[str, int]
    size: int


def _header(
    names: list[str], tensors: Mapping[str, TensorInfo], align: int
) -> tuple[bytes, dict[str, int]]:
    """The safetensors header of one shard and the absolute offset of each tensor in it."""
    offsets, position = {}, 0
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}

    # Whole cache lines first keeps those aligned to one, for whoever reads them where they lie;
    # then wide types first keeps every tensor aligned to its item size.
    def place(name: str) -> tuple[bool, int]:
        return tensors[name].nbytes % CACHE_LINE > 0, -tensors[name].dtype.itemsize

    for name in sorted(names, key=place):
        info = tensors[name]
        end = position + info.nbytes
        entries[name] = {
            "dtype": DTYPE_NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [position, end],
        }
        offsets[name], position = position, end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % align)
    header = struct.pack("<Q", len(text)) + text
    return header, {name: len(header) + offset for name, offset in offsets.items()}


def plan_shards(
    tensors: Mapping[str, TensorInfo],
    max_bytes: int,
    stem: str = MODEL,
    align: int = CACHE_LINE,
) -> list[Shard]:
    """Fill shards in order up to `max_bytes`; a larger tensor gets a shard of its own, because the
    format cannot split one. `stem` begins the file names; data starts at a multiple of `align`."""
    groups: list[list[str]] = [[]]
    used = 0
    for name, info in tensors.items():
        if groups[-1] and used + info.nbytes > max_bytes:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += info.nbytes
    shards = []
    for number, names in enumerate(groups, start=1):
        file = f"{stem}.safetensors"
        if len(groups) > 1:
            file = f"{stem}-{number:05d}-of-{len(groups):05d}.safetensors"
        header, offsets = _header(names, tensors, align)
        size = len(header) + sum(tensors[name].nbytes for name in names)
        shards.append(Shard(file, header, offsets, size))
    return shards
