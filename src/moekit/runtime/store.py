"""`ExpertStore`: the experts of a packed model, read one at a time from disk, never a wrong one.

Reads are direct where the file system can, so the page cache neither hides what a read costs nor
takes memory that the budget does not know of. Whatever keeps a read from giving exactly the bytes
that were packed raises `StoreError`.
"""

from __future__ import annotations

import errno
import functools
import os
import threading
import zlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from moekit.core.checkpoint import Checkpoint, TensorInfo
from moekit.core.packed import PAGE, ExpertParts, PackedLayer, check_record, checksum, read_parts
from moekit.core.packed_header import PackedHeader
from moekit.core.packed_resident import decoded
from moekit.ops import native
from moekit.runtime.pages import page_aligned
from moekit.runtime.resident_reader import ResidentReader, Span
from moekit.runtime.store_files import Record, StoreError, find_records

_NO_DIRECT = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP}


@dataclass(frozen=True)
class Place:
    """Where the records of an expert lie one after the other: in an open file, from `offset` on."""

    file: int
    offset: int
    sizes: tuple[int, ...]


@dataclass
class StoreStats:
    """What a store has read: experts, read calls and bytes from its files."""

    experts: int = 0
    reads: int = 0
    bytes: int = 0


class ExpertStore:
    """The experts of a packed model directory, by MoE layer (0, 1, ...) and expert.

    `layers` describes them and `stats` counts what was read. May be used from several threads.
    Opening checks the header, the presence and the size of every file, and reads no expert.
    """

    def __init__(
        self, path: Path, header: PackedHeader, records: dict[str, Record], direct: bool
    ) -> None:
        self.path = path
        self.header = header
        self.layers: tuple[PackedLayer, ...] = header.layers
        self.stats = StoreStats()
        self._records = records
        self._direct = direct
        # By name and whether opened for direct reads: another thread may still be reading.
        self._files: dict[tuple[str, bool], int] = {}
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, direct: bool = True) -> ExpertStore:
        """Open the packed model in directory `path`; `direct` avoids the page cache.

        Raises `UserError` for a directory without a packed model and `StoreError` for one whose
        files are missing, cut short or not those that the header describes.
        """
        directory = Path(path)
        header = PackedHeader.read(directory)
        return cls(directory, header, find_records(directory, header), direct)

    @property
    def direct(self) -> bool:
        """Whether reads bypass the page cache; False once a file system has refused it."""
        return self._direct

    def num_planes(self, layer: int, expert: int) -> int:
        return self.layers[layer].num_planes(expert)

    def nbytes(self, layer: int, expert: int, planes: int | None = None) -> int:
        """Bytes that reading an expert, or its first `planes` planes, takes on disk and in
        memory."""
        return sum(record.size for record in self._planes(layer, expert, planes))

    @property
    def expert_bytes(self) -> int:
        """Bytes of all experts."""
        return sum(
            self.nbytes(position, expert)
            for position, layer in enumerate(self.layers)
            for expert in range(layer.num_experts)
        )

    def read(self, layer: int, expert: int, planes: int | None = None) -> ExpertParts:
        """Read an expert, or its first `planes` planes, into memory of its own."""
        return self.read_into(
            page_aligned(self.nbytes(layer, expert, planes)), layer, expert, planes
        )

    def read_into(
        self, buffer: Tensor, layer: int, expert: int, planes: int | None = None
    ) -> ExpertParts:
        """Read an expert into `buffer` (bytes, `page_aligned`); the result is views into it where
        the arrays are not stored in tiles.

        Raises `StoreError`, and then what the buffer holds is worth nothing.
        """
        pieces = self.fetch(buffer, layer, expert, planes)
        return read_parts(self.layers[layer], expert, pieces)

    def fetch(
        self, buffer: Tensor, layer: int, expert: int, planes: int | None = None
    ) -> list[Tensor]:
        """Read the records of an expert into `buffer` as `read_into` does; return them as they are
        stored."""
        records = self._planes(layer, expert, planes)
        size = sum(record.size for record in records)
        if buffer.dtype != torch.uint8 or buffer.ndim != 1 or len(buffer) < size:
            raise ValueError(
                f"an expert of {size} bytes does not fit {buffer.dtype} {buffer.shape}"
            )
        start = 0
        for run in _runs(records):
            length = sum(record.size for record in run)
            self._read(run[0].file, run[0].offset, buffer[start : start + length])
            start += length
        pieces = _pieces(buffer, records)
        sums = [checksum(piece.numpy().data, crc32) for piece in pieces]
        self._check(layer, expert, pieces, sums)
        return pieces

    @functools.cached_property
    def placed(self) -> bool:
        """Whether the planes of every expert lie one after the other, so that it has a `place`."""
        return all(
            len(list(_runs(self._planes(layer, expert, None)))) == 1
            for layer, described in enumerate(self.layers)
            for expert in range(described.num_experts)
        )

    def place(self, layer: int, expert: int, planes: int | None = None) -> Place:
        """Where to read an expert, or its first `planes` planes, without `fetch`, if the store is
        `placed`. What was read from there goes through `arrived`.

        Raises `StoreError` for a file that cannot be opened.
        """
        records = self._planes(layer, expert, planes)
        try:
            file = self._file(records[0].file)
        except OSError as error:
            raise self._unreadable(records[0].file, error) from None
        return Place(file, records[0].offset, tuple(record.size for record in records))

    def arrived(
        self,
        buffer: Tensor,
        layer: int,
        expert: int,
        sums: Sequence[int],
        planes: int | None = None,
    ) -> None:
        """Verify and count an expert that was read from its place; `sums` are the checksums of its
        records in `buffer`. Raises `StoreError`."""
        records = self._planes(layer, expert, planes)
        with self._lock:
            self.stats.reads += 1
            self.stats.bytes += len(buffer)
        self._check(layer, expert, _pieces(buffer, records), sums)

    def resident(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors of the resident part, by the model's parameter names, each verified; what is
        stored encoded is decoded."""
        for name, stored in self.resident_stored():
            if self.header.encoded is not None and name in self.header.encoded.matrices:
                yield name, decoded(self.header.encoded, name, stored)
            else:
                yield name, stored

    def resident_stored(
        self, *, whole: bool = False, names: Collection[str] | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """The tensors of the resident part, or `names` of them, as they are stored, each verified;
        encoded ones are bytes [1, n]. With `whole` they lie in one piece of memory as in their
        files."""
        infos, spans = self.resident_info(), []
        for name in infos if names is None else names:
            record = self._records[name]
            spans.append(Span(name, record.file, record.offset, record.offset + record.size))
        spans.sort(key=lambda span: (span.file, span.start))
        for span, data in ResidentReader(spans, self._read, whole=whole):
            crc = crc32(data.numpy().data)
            if crc != self.header.resident[span.name]:
                raise StoreError(
                    f"{self.path / span.file}: tensor {span.name} is damaged: its checksum is "
                    f"{crc:08x} instead of {self.header.resident[span.name]:08x}. Copy the file "
                    "again or convert the model again."
                )
            info = infos[span.name]
            if data.storage_offset() % info.dtype.itemsize:
                data = data.clone()
            yield span.name, data.view(info.dtype).view(info.shape)

    def resident_bytes(self, name: str, start: int, stop: int) -> Tensor:
        """Bytes `start` to `stop` of a tensor of the resident part, which nothing verifies."""
        record = self._records[name]
        first = (record.offset + start) // PAGE * PAGE
        last = record.offset + stop
        pages = page_aligned(-(-(last - first) // PAGE) * PAGE)
        self._read(record.file, first, pages, last)
        return pages[record.offset + start - first : last - first]

    def resident_info(self) -> dict[str, TensorInfo]:
        """Shape and dtype of the tensors of the resident part as they are stored; none is read."""
        found = {}
        for name in self.header.resident_files:
            with Checkpoint(self.path / name) as file:
                found.update({tensor: file.info(tensor) for tensor in file.names()})
        return found

    def _planes(self, layer: int, expert: int, planes: int | None) -> list[Record]:
        if not 0 <= layer < len(self.layers):
            raise IndexError(f"layer {layer} of {len(self.layers)}")
        described = self.layers[layer]
        if not 0 <= expert < described.num_experts:
            raise IndexError(f"expert {expert} of {described.num_experts} in layer {layer}")
        count = described.num_planes(expert)
        if planes is not None and not 1 <= planes <= count:
            raise IndexError(f"{planes} of {count} planes of expert {expert} in layer {layer}")
        return [
            self._records[described.tensor_name(expert, plane)]
            for plane in range(count if planes is None else planes)
        ]

    def _check(
        self, layer: int, expert: int, pieces: Sequence[Tensor], sums: Sequence[int]
    ) -> None:
        # Every time: a file may change while it is open, and a disk may fail late.
        for plane, (piece, crc) in enumerate(zip(pieces, sums, strict=True)):
            wrong = check_record(self.header, layer, expert, plane, piece.numpy().data, crc)
            if wrong is None:
                continue
            record = self._records[self.layers[layer].tensor_name(expert, plane)]
            raise StoreError(
                f"{self.path / record.file}: expert {expert} of layer {layer} (plane {plane}, "
                f"bytes {record.offset} to {record.offset + record.size}) is damaged: {wrong}. "
                "Copy the file again or convert the model again."
            )
        with self._lock:
            self.stats.experts += 1

    def _read(self, name: str, offset: int, into: Tensor, needed: int | None = None) -> int:
        """Fill `into` from `offset` on; with `needed` the file may end there or later, and the
        count of bytes that were read is less."""
        view = into.numpy().data
        stop = offset + len(view) if needed is None else needed
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self._file(name), [view[done:]], offset + done)
            except OSError as error:
                if error.errno in _NO_DIRECT and self._direct:
                    self._direct = False
                    continue
                raise self._unreadable(name, error) from None
            with self._lock:
                self.stats.reads += 1
                self.stats.bytes += count
            done += count
            if needed is not None and offset + done >= needed:
                break
            if count == 0:
                raise StoreError(
                    f"{self.path / name} became shorter while it was open: bytes {offset} to "
                    f"{stop} were asked for and it ends at {offset + done}."
                )
        return done

    def _file(self, name: str) -> int:
        with self._lock:
            key = (name, self._direct)
            if key not in self._files:
                flags = os.O_RDONLY | (os.O_DIRECT if self._direct else 0)
                self._files[key] = os.open(self.path / name, flags)
            return self._files[key]

    def _unreadable(self, name: str, error: OSError) -> StoreError:
        return StoreError(
            f"{self.path / name} cannot be read: {error.strerror or error}. Nothing that was read "
            "is used; check the disk, then copy the file again or convert the model again."
        )

    def close(self) -> None:
        """Close the files, when nobody reads any more; reading again opens them again."""
        with self._lock:
            while self._files:
                os.close(self._files.popitem()[1])

    def __enter__(self) -> ExpertStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def crc32(data: memoryview, crc: int = 0) -> int:
    """zlib's checksum, several times as fast where the native kernels are in use."""
    kernels = native.loaded()
    return zlib.crc32(data, crc) if kernels is None else kernels.crc32(data, crc)


def _pieces(buffer: Tensor, records: Sequence[Record]) -> list[Tensor]:
    """Where each of the records lies that `buffer` holds one after the other."""
    stops = list(accumulate(record.size for record in records))
    return [buffer[stop - record.size : stop] for record, stop in zip(records, stops, strict=True)]


def _runs(records: list[Record]) -> Iterator[list[Record]]:
    """Records that lie one after the other, to be fetched by one read."""
    run: list[Record] = []
    for record in records:
        if run and (run[-1].file, run[-1].offset + run[-1].size) != (record.file, record.offset):
            yield run
            run = []
        run.append(record)
    if run:
        yield run
