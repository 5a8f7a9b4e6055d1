"""Reading a sharded safetensors checkpoint lazily, one tensor, one expert or one slice at a time.

Headers and the index come from disk, so they are validated before anything is read through them.
Tensors are read with `pread` into memory of their own: a file that shrinks while it is open gives
an error (a memory map would kill the process), and only what was asked for is ever held.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from moekit.core.errors import UserError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

# The safetensors format itself caps headers at this size.
MAX_HEADER_BYTES = 100_000_000

# Name in the file -> (bits per element, torch dtype or None where torch cannot hold it).
_DTYPES: dict[str, tuple[int, torch.dtype | None]] = {
    "F64": (64, torch.float64),
    "F32": (32, torch.float32),
    "F16": (16, torch.float16),
    "BF16": (16, torch.bfloat16),
    "I64": (64, torch.int64),
    "I32": (32, torch.int32),
    "I16": (16, torch.int16),
    "I8": (8, torch.int8),
    "U64": (64, torch.uint64),
    "U32": (32, torch.uint32),
    "U16": (16, torch.uint16),
    "U8": (8, torch.uint8),
    "BOOL": (8, torch.bool),
    "C64": (64, torch.complex64),
    "F8_E4M3": (8, torch.float8_e4m3fn),
    "F8_E5M2": (8, torch.float8_e5m2),
    "F8_E8M0": (8, torch.float8_e8m0fnu),
    "F6_E2M3": (6, None),
    "F6_E3M2": (6, None),
    "F4": (4, None),
}
DTYPE_NAMES = {dtype: name for name, (_, dtype) in _DTYPES.items() if dtype is not None}


@dataclass(frozen=True)
class TensorInfo:
    """Shape and torch dtype of a tensor that need not be in memory."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class _Entry:
    """Where a tensor lies: its shard and the absolute byte range in that file."""

    file: str
    dtype_name: str
    shape: tuple[int, ...]
    start: int
    stop: int


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} occurs twice")
    return dict(pairs)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _parse_entry(file: str, name: str, raw: Any, data_start: int, data_bytes: int) -> _Entry:
    def bad(what: str) -> UserError:
        return UserError(f"{file}: the header entry of tensor {name!r} is damaged: {what}.")

    if not isinstance(raw, dict) or not {"dtype", "shape", "data_offsets"} <= set(raw):
        raise bad("it needs dtype, shape and data_offsets")
    dtype_name, shape, offsets = raw["dtype"], raw["shape"], raw["data_offsets"]
    if dtype_name not in _DTYPES:
        raise bad(f"unknown dtype {dtype_name!r}")
    if not isinstance(shape, list) or not all(_is_count(size) for size in shape):
        raise bad(f"shape {shape!r}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise bad(f"data_offsets {offsets!r}")
    start, stop = offsets
    bits = math.prod(shape) * _DTYPES[dtype_name][0]
    if bits % 8 or stop - start != bits // 8:
        raise bad(f"{stop - start} bytes for shape {shape} of {dtype_name}, expected {bits / 8:g}")
    if stop > data_bytes:
        raise UserError(
            f"{file} is truncated: tensor {name!r} ends at byte {data_start + stop}, the file has "
            f"{data_start + data_bytes} bytes. Download or copy this shard again."
        )
    return _Entry(file, dtype_name, tuple(shape), data_start + start, data_start + stop)


def read_header(path: Path) -> dict[str, _Entry]:
    """The validated header of one safetensors file: every tensor's dtype, shape and byte range.

    Raises `UserError` for a header that is damaged, for ranges that overlap or leave the file, and
    for a truncated file, with the expected and the actual number of bytes.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if len(prefix) < 8 or length > size - 8:
            raise UserError(
                f"{path} is truncated or no safetensors file: it has {size} bytes and its header "
                f"would need {8 + max(length, 2)}."
            )
        if length > MAX_HEADER_BYTES:
            raise UserError(
                f"{path}: a header of {length} bytes is larger than the format's limit of "
                f"{MAX_HEADER_BYTES}."
            )
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: the safetensors header cannot be read: {error}.") from None
    if not isinstance(header, dict):
        raise UserError(f"{path}: the safetensors header is no JSON object.")
    header.pop("__metadata__", None)

    data_start = 8 + length
    # The largest end first, so that a truncated file is reported with its full expected size.
    ends = [
        raw["data_offsets"][1]
        for raw in header.values()
        if isinstance(raw, dict)
        and isinstance(raw.get("data_offsets"), list)
        and len(raw["data_offsets"]) == 2
        and _is_count(raw["data_offsets"][1])
    ]
    expected = data_start + max(ends, default=0)
    if size < expected:
        raise UserError(
            f"{path} is truncated: its header describes {expected} bytes, the file has {size}. "
            "Download or copy this shard again."
        )
    entries = {
        name: _parse_entry(str(path), name, raw, data_start, size - data_start)
        for name, raw in header.items()
    }
    end, before = data_start, None
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start < end:
            raise UserError(f"{path}: tensors {before!r} and {name!r} overlap in the file.")
        end, before = entry.stop, name
    if size > expected:
        raise UserError(
            f"{path} has {size} bytes, its header describes {expected}: the shard is damaged."
        )
    return entries


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; `UserError` where the file is missing or holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object.")
    return content


def _read_index(path: Path) -> dict[str, str]:
    """The weight map of an index: tensor name -> plain file name beside the index."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path}: weight_map is missing or empty.")
    for name, file in weight_map.items():
        plain = isinstance(file, str) and file == os.path.basename(file)
        if not plain or not file.endswith(".safetensors"):
            raise UserError(
                f"{path}: tensor {name!r} points to {file!r}; only names of .safetensors files in "
                "the same directory are accepted."
            )
    missing = sorted({file for file in weight_map.values() if not (path.parent / file).is_file()})
    if missing:
        raise UserError(
            f"{path} names {len(set(weight_map.values()))} shards and {len(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing: {', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}. Download or copy them again."
        )
    return weight_map


def _no_weights(path: Path) -> UserError:
    pickles = [file.name for file in path.iterdir() if file.suffix in PICKLE_SUFFIXES]
    if pickles:
        return UserError(
            f"{path} has only pickled weights ({sorted(pickles)[0]}), which are never read because "
            "loading them can run code. Save the model as safetensors first."
        )
    return UserError(f"{path} has no model: neither {SINGLE_FILE} nor {INDEX_FILE} is in it.")


@dataclass
class TensorSlice:
    """One tensor of a checkpoint, read only where it is indexed: `slice[e]`, `slice[a:b]`."""

    checkpoint: Checkpoint
    name: str
    shape: tuple[int, ...] = field(init=False)
    dtype: torch.dtype = field(init=False)

    def __post_init__(self) -> None:
        info = self.checkpoint.info(self.name)
        self.shape, self.dtype = info.shape, info.dtype

    def __getitem__(self, key: int | slice | tuple[Any, ...]) -> torch.Tensor:
        """Index as a tensor; the first axis decides what is read, the rest is cut in memory."""
        first, rest = (key[0], key[1:]) if isinstance(key, tuple) and key else (key, ())
        if not self.shape or not isinstance(first, int | slice):
            return self.checkpoint.get(self.name)[key]
        if isinstance(first, int):
            row = first + self.shape[0] if first < 0 else first
            if not 0 <= row < self.shape[0]:
                raise IndexError(f"{self.name}: index {first} of {self.shape[0]}")
            rows = self.checkpoint.get_rows(self.name, row, row + 1)[0]
            return rows[rest] if rest else rows
        start, stop, step = first.indices(self.shape[0])
        if step < 0:
            raise IndexError(f"{self.name}: steps below zero are not supported")
        rows = self.checkpoint.get_rows(self.name, start, max(start, stop))[::step]
        return rows[(slice(None), *rest)] if rest else rows


class Checkpoint:
    """A safetensors checkpoint: a directory (one file, or shards with an index) or one file.

    Opening reads and validates every header and no tensor. Raises `UserError` for a directory
    without weights, pickled weights, missing or truncated shards, and damaged headers or indices.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._files: dict[str, int] = {}
        if self.path.is_file():
            self.directory = self.path.parent
            self._entries = read_header(self.path)
        elif not self.path.is_dir():
            raise UserError(f"{self.path} does not exist.")
        else:
            self.directory = self.path
            self._entries = self._read_directory()

    def _read_directory(self) -> dict[str, _Entry]:
        index = self.path / INDEX_FILE
        if not index.is_file():
            single = self.path / SINGLE_FILE
            if not single.is_file():
                raise _no_weights(self.path)
            return read_header(single)
        weight_map = _read_index(index)
        headers = {file: read_header(self.path / file) for file in sorted(set(weight_map.values()))}
        for name, file in weight_map.items():
            if name not in headers[file]:
                raise UserError(f"{index} places tensor {name!r} in {file}, which lacks it.")
        return {name: headers[file][name] for name, file in weight_map.items()}

    def names(self) -> list[str]:
        return list(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.stop - entry.start for entry in self._entries.values())

    @property
    def files(self) -> list[Path]:
        """The shards, sorted by name."""
        return sorted({Path(entry.file) for entry in self._entries.values()})

    def _entry(self, name: str) -> _Entry:
        try:
            return self._entries[name]
        except KeyError:
            raise UserError(f"{self.path} has no tensor {name!r}.") from None

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self.info(name).dtype

    def info(self, name: str) -> TensorInfo:
        entry = self._entry(name)
        dtype = _DTYPES[entry.dtype_name][1]
        if dtype is None:
            raise UserError(
                f"{entry.file}: tensor {name!r} has dtype {entry.dtype_name}, which "
                "torch cannot hold."
            )
        return TensorInfo(entry.shape, dtype)

    def get(self, name: str) -> torch.Tensor:
        """One whole tensor."""
        info = self.info(name)
        return self._read(name, 0, info.nbytes).view(info.dtype).view(info.shape)

    def get_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """`tensor[start:stop]` along the first axis; reads those bytes only."""
        info = self.info(name)
        if not info.shape or not 0 <= start <= stop <= info.shape[0]:
            raise IndexError(f"{name}: rows {start} to {stop} of shape {list(info.shape)}")
        rest = tuple((0, size) for size in info.shape[1:])
        return self.get_block(name, ((start, stop), *rest))

    def get_block(self, name: str, region: tuple[tuple[int, int], ...]) -> torch.Tensor:
        """The block with one (start, stop) per axis; leading axes with one index cost nothing."""
        info = self.info(name)
        if not region:
            return self.get(name)
        strides = [math.prod(info.shape[i + 1 :]) * info.dtype.itemsize for i in range(len(region))]
        axis = 0
        while axis < len(region) - 1 and region[axis][1] - region[axis][0] == 1:
            axis += 1
        begin = sum(region[i][0] * strides[i] for i in range(axis + 1))
        count = max(0, region[axis][1] - region[axis][0])
        data = self._read(name, begin, begin + count * strides[axis]).view(info.dtype)
        block = data.view(*[1] * axis, count, *info.shape[axis + 1 :])
        for later in range(axis + 1, len(region)):
            block = block.narrow(later, region[later][0], region[later][1] - region[later][0])
        return block

    def get_slice(self, name: str) -> TensorSlice:
        """A lazy handle: `get_slice(name)[e]` reads one expert out of a fused bank [E, ...]."""
        return TensorSlice(self, name)

    def _read(self, name: str, start: int, stop: int) -> torch.Tensor:
        entry = self._entry(name)
        if entry.file not in self._files:
            opened = os.open(entry.file, os.O_RDONLY)
            if self._files.setdefault(entry.file, opened) != opened:
                # Another thread was faster.
                os.close(opened)
        data = torch.empty(stop - start, dtype=torch.uint8)
        view = data.numpy().data
        done = 0
        while done < len(view):
            # One call moves at most 2 GiB.
            count = os.preadv(self._files[entry.file], [view[done:]], entry.start + start + done)
            if count == 0:
                raise UserError(
                    f"{entry.file} became shorter while it was read: tensor {name!r} ends at byte "
                    f"{entry.stop}, the file has {os.path.getsize(entry.file)}."
                )
            done += count
        return data

    def close(self) -> None:
        """Close the shards; reading again opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self.close()
