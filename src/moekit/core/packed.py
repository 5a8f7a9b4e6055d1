"""The packed model directory: its files, and how the records of its experts are laid out.

    config.json, tokenizer, ...     as in any model directory
    packed.json                     its header (`core.packed_header`)
    resident[-...].safetensors      all but the routed experts, by the model's parameter names; a
                                    matrix that is stored encoded is a `U8` tensor [1, n]
    experts[-...].safetensors       one record for each expert, or for each of its planes

A record is a `U8` tensor [1, n] that starts at a multiple of `PAGE` in its file and is a multiple
of it long, so one direct read fetches it; the planes of an expert follow each other. It begins with
`RECORD_HEADER` bytes: magic, layer (counted over MoE layers), expert, plane, CRC-32 of all other
bytes, bytes used, and the id of the pack. Then come the arrays of `RecordLayout`, each at a
multiple of `ALIGN`, little-endian; those of the integer codecs in tiles (`ops.codecs.tiles`). So do
the arrays of an encoded matrix of the resident part (`core.packed_resident`), from its first byte.
"""

from __future__ import annotations

import functools
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moekit.ops.codecs import Codec, Encoded, Part, make_codec
from moekit.ops.codecs.tiles import tile, tiled_nbytes, tiled_shape, untile

if TYPE_CHECKING:
    from moekit.core.packed_header import PackedHeader

PAGE = 4096
ALIGN = 64
RECORD_HEADER = 64
MAGIC = b"moekitE\x01"

_FIELDS = struct.Struct("<8sIIIIQ16s")
_CRC_AT = slice(20, 24)
# (bytes, the checksum so far) -> the checksum.
Crc32 = Callable[[memoryview, int], int]


@dataclass(frozen=True)
class CodecChoice:
    """A codec by name, with its group size."""

    name: str
    group_size: int

    def make(self) -> Codec:
        return _made(self.name, self.group_size)


@functools.lru_cache
def _made(name: str, group_size: int) -> Codec:
    return make_codec(name, group_size)


@dataclass(frozen=True)
class PackedLayer:
    """One MoE layer: the matrices [O, I] and biases [O] of an expert, and the codec of each.

    `path` names the block; `layer_index` is the decoder layer. `record_of` says whose record each
    expert of the router has, where several share one; their own where it is empty.
    """

    path: str
    layer_index: int
    matrices: tuple[Part, ...]
    vectors: tuple[Part, ...]
    codecs: tuple[CodecChoice, ...]
    record_of: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.record_of:
            object.__setattr__(self, "record_of", tuple(range(len(self.codecs))))

    @property
    def num_experts(self) -> int:
        return len(self.codecs)

    @property
    def shares_records(self) -> bool:
        """Whether several experts of the router have one record."""
        return self.record_of != tuple(range(self.num_experts))

    def record(self, expert: int, plane: int) -> RecordLayout:
        """Where the arrays lie in the record of a plane."""
        return _record(self.matrices, self.vectors, self.codecs[expert], plane)

    def num_planes(self, expert: int) -> int:
        return self.codecs[expert].make().num_planes

    def tensor_name(self, expert: int, plane: int) -> str:
        """The name of a record in the files."""
        return f"{self.path}.{self.record_of[expert]}.plane{plane}"


@dataclass(frozen=True)
class StoredArray:
    """An array of a record: the matrix or bias it belongs to, which part of its encoding it is, and
    where it begins."""

    owner: str
    part: Part
    offset: int
    tiled: bool

    @property
    def nbytes(self) -> int:
        return tiled_nbytes(self.part) if self.tiled else self.part.nbytes

    def write(self, array: Tensor, record: Tensor) -> None:
        """Copy the array into the bytes [n] of its record."""
        assert (tuple(array.shape), array.dtype) == (self.part.shape, self.part.dtype)
        stored = tile(array) if self.tiled else array.contiguous()
        record[self.offset : self.offset + self.nbytes] = stored.reshape(-1).view(torch.uint8)

    def read(self, record: Tensor) -> Tensor:
        """The array; a view into the bytes [n] of its record unless it is stored in tiles."""
        raw = record[self.offset : self.offset + self.nbytes].view(self.part.dtype)
        if self.tiled:
            return untile(raw.view(tiled_shape(self.part)), self.part)
        return raw.view(self.part.shape)


@dataclass(frozen=True)
class RecordLayout:
    """The arrays of a record; `used` bytes are data, `size` is a multiple of `PAGE`."""

    arrays: tuple[StoredArray, ...]
    used: int
    size: int


@functools.lru_cache
def _record(
    matrices: tuple[Part, ...], vectors: tuple[Part, ...], choice: CodecChoice, plane: int
) -> RecordLayout:
    codec = choice.make()
    parts = [
        (matrix.name, part, codec.tiled)
        for matrix in matrices
        for part in codec.layout((matrix.shape[0], matrix.shape[1]))[plane]
    ]
    if plane == 0:
        parts += [(vector.name, vector, False) for vector in vectors]
    arrays, offset, used = [], RECORD_HEADER, RECORD_HEADER
    for owner, part, tiled in parts:
        arrays.append(StoredArray(owner, part, offset, tiled))
        used = offset + arrays[-1].nbytes
        offset = -(-used // ALIGN) * ALIGN
    return RecordLayout(tuple(arrays), used, -(-used // PAGE) * PAGE)


@dataclass(frozen=True)
class ExpertParts:
    """An expert: its encoded matrices ("gate", "up", "down") and plain biases by name."""

    codec: Codec
    matrices: dict[str, Encoded]
    vectors: dict[str, Tensor]


def write_record(
    header: PackedHeader, position: int, expert: int, plane: int, parts: ExpertParts
) -> Tensor:
    """The record [1, n] of one plane of an expert."""
    layout = header.layers[position].record(expert, plane)
    record = torch.zeros(layout.size, dtype=torch.uint8)
    for stored in layout.arrays:
        if stored.owner in parts.vectors:
            stored.write(parts.vectors[stored.owner], record)
        else:
            stored.write(parts.matrices[stored.owner].planes[plane][stored.part.name], record)
    seal_record(header, position, expert, plane, record)
    return record[None]


def seal_record(
    header: PackedHeader,
    position: int,
    expert: int,
    plane: int,
    record: Tensor,
    crc32: Crc32 = zlib.crc32,
) -> None:
    """Begin a record [n] that has its arrays with what it is and its checksum."""
    layout = header.layers[position].record(expert, plane)
    fields = (MAGIC, position, expert, plane, 0, layout.used, bytes.fromhex(header.id))
    view = record.numpy().data
    view[: _FIELDS.size] = _FIELDS.pack(*fields)
    view[_CRC_AT] = struct.pack("<I", checksum(view, crc32))


def checksum(record: memoryview, crc32: Crc32 = zlib.crc32) -> int:
    """CRC-32 of a record without the field that holds it.

    `crc32` computes what zlib's function of that name does.
    """
    crc = 0
    for start, stop in checked_bytes(len(record)):
        crc = crc32(record[start:stop], crc)
    return crc


def checked_bytes(size: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Which bytes of a record of `size` bytes its checksum is of, in this order."""
    return (0, _CRC_AT.start), (_CRC_AT.stop, size)


def check_record(
    header: PackedHeader,
    position: int,
    expert: int,
    plane: int,
    record: memoryview,
    found: int,
) -> str | None:
    """What is wrong with a record that was read, and whose `checksum` was `found`, or None."""
    layout = header.layers[position].record(expert, plane)
    magic, at, e, p, crc, used, pack_id = _FIELDS.unpack(record[: _FIELDS.size])
    if magic != MAGIC:
        return "it does not begin as a record does"
    if found != crc:
        return f"its checksum is {found:08x} instead of {crc:08x}"
    stored = header.layers[position].record_of[expert]
    if (at, e, p, used) != (position, stored, plane, layout.used):
        return f"it says it is plane {p} of expert {e} of layer {at} with {used} bytes"
    if pack_id.hex() != header.id:
        return f"it belongs to another packed model ({pack_id.hex()} instead of {header.id})"
    return None


def read_parts(layer: PackedLayer, expert: int, records: list[Tensor]) -> ExpertParts:
    """The arrays of an expert from the records [n] of its first planes, views where they are not
    stored in tiles."""
    planes: dict[str, list[dict[str, Tensor]]] = {m.name: [] for m in layer.matrices}
    vectors = {}
    for plane, record in enumerate(records):
        for arrays in planes.values():
            arrays.append({})
        for stored in layer.record(expert, plane).arrays:
            if stored.owner in planes:
                planes[stored.owner][plane][stored.part.name] = stored.read(record)
            else:
                vectors[stored.owner] = stored.read(record)
    matrices = {
        matrix.name: Encoded((matrix.shape[0], matrix.shape[1]), tuple(planes[matrix.name]))
        for matrix in layer.matrices
    }
    return ExpertParts(layer.codecs[expert].make(), matrices, vectors)
