"""A fine-tune on disk as its base and a ternary difference: the format, its code and its reader.

`task_vector.json` names the base; `task_vector.safetensors` has for each tensor the positions and
signs of the entries that moved, all by one size. Positions are gaps in a Rice code, near the
entropy of their density: the unary parts of all gaps first, then the rest with the sign, so that
both decode without a loop (ComPEFT 2311.13171 stores ternary task vectors like this). Shapes: K
entries that moved.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moekit.core.checkpoint import Checkpoint, read_json
from moekit.core.deferred import Deferred, Region
from moekit.core.errors import UserError
from moekit.core.record import FileHash

HEAD_FILE = "task_vector.json"
DATA_FILE = "task_vector.safetensors"
VERSION = 1


@dataclass
class TaskVectorHead:
    """What a compressed task vector belongs to and how it is written.

    `base` is the model it is added to and `base_hashes` the hashes of its shards by name; `size`
    the magnitude of every entry that moved; `rice` the bits of a gap that are not unary; `counts`
    the entries that moved by tensor.
    """

    base: str
    base_hashes: dict[str, str]
    density: float
    size: float
    rice: int
    counts: dict[str, int] = field(default_factory=dict)
    version: int = VERSION

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def read(cls, directory: Path) -> TaskVectorHead:
        """The head in a directory; `UserError` for one that this moekit cannot read."""
        content = read_json(directory / HEAD_FILE)
        if content.get("version") != VERSION or set(content) != set(cls.__dataclass_fields__):
            raise UserError(f"{directory / HEAD_FILE} is no task vector that this moekit reads.")
        return cls(**content)


def rice_bits(density: float) -> int:
    """The bits of a gap that are not unary, best for entries that move with this probability."""
    mean = (1 - density) / density
    return max(0, round(math.log2(max(math.log(2) * mean, 1))))


def encode(positions: np.ndarray, negative: np.ndarray, rice: int) -> Tensor:
    """The code (bytes) of K ascending positions and whether each entry is negative."""
    gaps = np.diff(positions, prepend=-1) - 1
    unary = np.zeros(int((gaps >> rice).sum()) + len(gaps), dtype=np.uint8)
    unary[np.cumsum((gaps >> rice) + 1) - 1] = 1
    fixed = np.empty((len(gaps), rice + 1), dtype=np.uint8)
    for bit in range(rice):
        fixed[:, bit] = (gaps >> (rice - 1 - bit)) & 1
    fixed[:, rice] = negative
    return torch.from_numpy(np.concatenate([np.packbits(unary), np.packbits(fixed)]))


def decode(code: Tensor, count: int, rice: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions (int64) and signs (float32, 1 or -1) of K = `count` entries."""
    fixed_bytes = -(-count * (rice + 1) // 8)
    raw = code.numpy()
    ends = np.flatnonzero(np.unpackbits(raw[: len(raw) - fixed_bytes]))[:count]
    fixed = np.unpackbits(raw[len(raw) - fixed_bytes :])[: count * (rice + 1)]
    fixed = fixed.reshape(count, rice + 1)
    gaps = (np.diff(ends, prepend=-1) - 1).astype(np.int64) << rice
    for bit in range(rice):
        gaps |= fixed[:, bit].astype(np.int64) << (rice - 1 - bit)
    return np.cumsum(gaps + 1) - 1, 1.0 - 2.0 * fixed[:, rice].astype(np.float32)


def hashes_of(checkpoint: Checkpoint) -> dict[str, str]:
    """The hash of every shard by name."""
    return {path.name: FileHash.of(path).sha256 for path in checkpoint.files}


def add_task_vector(
    directory: Path, base: Mapping[str, Deferred], base_files: Checkpoint
) -> tuple[Checkpoint, dict[str, Deferred]]:
    """The tensors of a base with the task vector of `directory` added, as they are read.

    Also the open file of the task vector. Raises `UserError` for another base than it was made for.
    """
    head = TaskVectorHead.read(directory)
    if hashes_of(base_files) != head.base_hashes:
        raise UserError(
            f"{directory} was made for another {head.base}: the hashes of its shards differ."
        )
    stored = Checkpoint(directory / DATA_FILE)
    made = dict(base)
    for name, count in head.counts.items():
        if name not in base or name not in stored:
            raise UserError(f"{directory} has no place for {name}; is it damaged?")
        made[name] = Deferred(
            base[name].shape, base[name].dtype, _reader(base[name], stored, name, head, count)
        )
    return stored, made


def _reader(
    below: Deferred, stored: Checkpoint, name: str, head: TaskVectorHead, count: int
) -> Callable[[Region], Tensor]:
    # The blocks of a tensor are read one after the other, and decoding is all or nothing.
    @functools.lru_cache(maxsize=1)
    def decoded() -> tuple[np.ndarray, np.ndarray]:
        return decode(stored.get(name), count, head.rice)

    width = math.prod(below.shape[1:])

    def read(region: Region) -> Tensor:
        start, stop = region[0] if region else (0, 1)
        rows: Any = below.rows(start, stop) if region else below.read().view(1)
        values = rows.float().contiguous()
        positions, signs = decoded()
        first, last = np.searchsorted(positions, [start * width, stop * width])
        places = torch.from_numpy(positions[first:last] - start * width)
        values.view(-1)[places] += torch.from_numpy(signs[first:last] * np.float32(head.size))
        if stop == (below.shape[0] if region else 1):
            decoded.cache_clear()
        made = values.to(below.dtype)
        if not region:
            return made.view(())
        return made[(slice(None), *(slice(a, b) for a, b in region[1:]))]

    return read
