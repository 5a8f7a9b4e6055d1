"""`ExpertStore`: the experts of a packed model, read one at a time from disk, never a wrong one.

Reads are direct where the file system can, so the page cache neither hides what a read costs nor
takes memory that the budget does not know of. Whatever keeps a read from giving exactly the bytes
that were packed raises `StoreError`.
"""

from __future__ import annotations

import errno
import os
import threading
import zlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from moekit.core.checkpoint import Checkpoint, TensorInfo, read_header
from moekit.core.errors import UserError
from moekit.core.packed import PAGE, ExpertParts, PackedLayer, check_record, read_parts
from moekit.core.packed_header import EncodedResident, PackedHeader
from moekit.core.packed_resident import decoded, matrix_arrays
from moekit.ops import native
from moekit.runtime.pages import page_aligned
from moekit.runtime.resident_reader import ResidentReader, Span

_NO_DIRECT = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP}


class StoreError(UserError):
    """A packed model that cannot be read as it was written; names the file and what to do."""


@dataclass(frozen=True)
class _Record:
    file: str
    offset: int
    size: int


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
        self, path: Path, header: PackedHeader, records: dict[str, _Record], direct: bool
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
        found: dict[str, _Record] = {}
        for name in (*header.resident_files, *header.expert_files):
            file = directory / name
            if not file.is_file():
                raise StoreError(f"{file} is missing; copy it again or convert the model again.")
            try:
                entries = read_header(file)
            except (UserError, OSError) as error:
                raise StoreError(str(error)) from None
            for tensor, entry in entries.items():
                found[tensor] = _Record(name, entry.start, entry.stop - entry.start)
        _check_tensors(directory, header, found)
        return cls(directory, header, found, direct)

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
        start, pieces = 0, []
        for run in _runs(records):
            length = sum(record.size for record in run)
            self._read(run[0].file, run[0].offset, buffer[start : start + length])
            start += length
        start = 0
        for plane, record in enumerate(records):
            pieces.append(buffer[start : start + record.size])
            self._check(layer, expert, plane, pieces[-1])
            start += record.size
        with self._lock:
            self.stats.experts += 1
        return pieces

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

    def _planes(self, layer: int, expert: int, planes: int | None) -> list[_Record]:
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

    def _check(self, layer: int, expert: int, plane: int, piece: Tensor) -> None:
        # Every time: a file may change while it is open, and a disk may fail late.
        wrong = check_record(self.header, layer, expert, plane, piece.numpy().data, crc32)
        if wrong is not None:
            record = self._records[self.layers[layer].tensor_name(expert, plane)]
            raise StoreError(
                f"{self.path / record.file}: expert {expert} of layer {layer} (plane {plane}, "
                f"bytes {record.offset} to {record.offset + record.size}) is damaged: {wrong}. "
                "Copy the file again or convert the model again."
            )

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


def _runs(records: list[_Record]) -> Iterator[list[_Record]]:
    """Records that lie one after the other, to be fetched by one read."""
    run: list[_Record] = []
    for record in records:
        if run and (run[-1].file, run[-1].offset + run[-1].size) != (record.file, record.offset):
            yield run
            run = []
        run.append(record)
    if run:
        yield run


def _check_tensors(directory: Path, header: PackedHeader, found: dict[str, _Record]) -> None:
    wanted = {}
    for layer in header.layers:
        for expert in range(layer.num_experts):
            for plane in range(layer.num_planes(expert)):
                name = layer.tensor_name(expert, plane)
                wanted[name] = layer.record(expert, plane).size
    for name, size in wanted.items():
        record = found.get(name)
        if record is None or record.file not in header.expert_files:
            raise StoreError(f"{directory}: {name} is in no file of experts; convert it again.")
        if record.size != size or record.offset % PAGE:
            raise StoreError(
                f"{directory / record.file}: {name} has {record.size} bytes at {record.offset}; "
                f"expected {size} at a multiple of {PAGE}. Convert the model again."
            )
    if header.encoded is not None:
        _check_encoded(directory, header.encoded, found)
    missing = sorted(set(header.resident) - set(found)) or sorted(
        set(found) - set(header.resident) - set(wanted)
    )
    if missing:
        raise StoreError(
            f"{directory}: {missing[0]} is in only one of the header and the files; they belong "
            "to different models. Convert the model again."
        )


def _check_encoded(directory: Path, encoded: EncodedResident, found: Mapping[str, _Record]) -> None:
    for name, part in encoded.matrices.items():
        _, size = matrix_arrays(encoded.codec, (part.shape[0], part.shape[1]))
        if name in found and found[name].size != size:
            raise StoreError(
                f"{directory}: {name} has {found[name].size} bytes; {encoded.codec.name} of "
                f"{list(part.shape)} has {size}. Convert the model again."
            )
