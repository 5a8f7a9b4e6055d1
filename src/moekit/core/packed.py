"""The packed model directory: what lies where, and how its header is read and checked.

    config.json, tokenizer, ...     as in any model directory
    packed.json                     this header
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

import dataclasses
import functools
import json
import re
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moekit.core.checkpoint import DTYPE_NAMES, read_json
from moekit.core.errors import UserError
from moekit.core.load import PACKED_FILE
from moekit.ops.codecs import Codec, Encoded, Part, make_codec
from moekit.ops.codecs.tiles import TILE_ROWS, tile, tiled_nbytes, tiled_shape, untile

FORMAT = "moekit.packed"
# A header has the least version that describes what is there; 3 brought encoded resident matrices,
# 4 records that several experts share.
PLAIN_VERSION, ENCODED_VERSION, SHARED_VERSION = 2, 3, 4
PAGE = 4096
ALIGN = 64
RECORD_HEADER = 64
MAGIC = b"moekitE\x01"

_FIELDS = struct.Struct("<8sIIIIQ16s")
_CRC_AT = slice(20, 24)
_MATRICES = ("gate", "up", "down")
_VECTORS = ("gate_bias", "up_bias", "down_bias")
# (bytes, the checksum so far) -> the checksum.
Crc32 = Callable[[memoryview, int], int]
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


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
    fields = (MAGIC, position, expert, plane, 0, layout.used, bytes.fromhex(header.id))
    view = record.numpy().data
    view[: _FIELDS.size] = _FIELDS.pack(*fields)
    view[_CRC_AT] = struct.pack("<I", checksum(view))
    return record[None]


def checksum(record: memoryview, crc32: Crc32 = zlib.crc32) -> int:
    """CRC-32 of a record without the field that holds it."""
    return crc32(record[_CRC_AT.stop :], crc32(record[: _CRC_AT.start], 0))


def check_record(
    header: PackedHeader,
    position: int,
    expert: int,
    plane: int,
    record: memoryview,
    crc32: Crc32 = zlib.crc32,
) -> str | None:
    """What is wrong with a record that was read, or None.

    `crc32` computes what zlib's function of that name does.
    """
    layout = header.layers[position].record(expert, plane)
    magic, at, e, p, crc, used, pack_id = _FIELDS.unpack(record[: _FIELDS.size])
    if magic != MAGIC:
        return "it does not begin as a record does"
    if (found := checksum(record, crc32)) != crc:
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


@dataclass(frozen=True)
class EncodedResident:
    """The matrices [O, I] of the resident part that are stored encoded, by name; their dtype is
    that which they had."""

    codec: CodecChoice
    matrices: Mapping[str, Part]


@dataclass(frozen=True)
class PackedHeader:
    """`packed.json`: `id` (32 hexadecimal digits) is also in every record.

    `resident` maps the tensors of the resident part to the CRC-32 of their bytes; `files` lists the
    names of the resident files and of the expert files. `encoded` is None where the resident part
    is stored as it was.
    """

    id: str
    layers: tuple[PackedLayer, ...]
    resident: Mapping[str, int]
    resident_files: tuple[str, ...]
    expert_files: tuple[str, ...]
    encoded: EncodedResident | None = None

    def _version(self) -> int:
        if any(layer.shares_records for layer in self.layers):
            return SHARED_VERSION
        return PLAIN_VERSION if self.encoded is None else ENCODED_VERSION

    def to_json(self) -> str:
        content = {
            "format": FORMAT,
            "version": self._version(),
            "tile": TILE_ROWS,
            "id": self.id,
            "layers": [_layer_to_json(layer) for layer in self.layers],
            "resident_files": list(self.resident_files),
            "expert_files": list(self.expert_files),
            "resident": {name: f"{crc:08x}" for name, crc in self.resident.items()},
        }
        if self.encoded is not None:
            content["resident_codec"] = dataclasses.asdict(self.encoded.codec)
            content["encoded"] = _parts_to_json(self.encoded.matrices.values())
        return json.dumps(content, indent=1) + "\n"

    @classmethod
    def read(cls, directory: Path) -> PackedHeader:
        """Read and check the header of a packed model; `UserError` says what is wrong with it."""
        path = directory / PACKED_FILE
        if not path.is_file():
            raise UserError(
                f"{directory} is no packed model: it has no {PACKED_FILE}. "
                "`moekit convert MODEL OUT --to packed` makes one."
            )
        content = read_json(path)
        if content.get("format") != FORMAT:
            raise UserError(f"{path} is no header of a packed model.")
        if content.get("version") not in (PLAIN_VERSION, ENCODED_VERSION, SHARED_VERSION):
            raise UserError(
                f"{path} has version {content.get('version')!r}; this moekit reads versions "
                f"{PLAIN_VERSION} to {SHARED_VERSION}. Convert the model again."
            )
        try:
            return cls._parsed(content)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            # A UserError is a ValueError too: an unknown codec, a width that does not fit.
            raise UserError(f"{path} is damaged: {type(error).__name__} {error}") from None

    @classmethod
    def _parsed(cls, content: Mapping[str, Any]) -> PackedHeader:
        files = {key: tuple(content[key]) for key in ("resident_files", "expert_files")}
        for name in (name for group in files.values() for name in group):
            if not re.fullmatch(r"[\w-]+\.safetensors", name, re.ASCII):
                raise ValueError(f"file name {name!r}")
        if not re.fullmatch("[0-9a-f]{32}", content["id"]):
            raise ValueError(f"id {content['id']!r}")
        if content["tile"] != TILE_ROWS:
            raise ValueError(f"tile {content['tile']!r}")
        made = cls(
            content["id"],
            tuple(_layer_from_json(layer) for layer in content["layers"]),
            {str(name): int(crc, 16) for name, crc in content["resident"].items()},
            **files,
            encoded=_encoded_from_json(content),
        )
        for layer in made.layers:
            for expert in range(layer.num_experts):
                layer.record(expert, layer.num_planes(expert) - 1)
        return made

    def with_resident(self, resident: Mapping[str, int]) -> PackedHeader:
        return dataclasses.replace(self, resident=resident)


def _layer_to_json(layer: PackedLayer) -> dict[str, Any]:
    table = sorted(set(layer.codecs), key=lambda choice: (choice.name, choice.group_size))
    return {
        "path": layer.path,
        "layer_index": layer.layer_index,
        "matrices": {part.name: list(part.shape) for part in layer.matrices},
        "vectors": _parts_to_json(layer.vectors),
        "codecs": [dataclasses.asdict(choice) for choice in table],
        "codec_of_expert": [table.index(choice) for choice in layer.codecs],
        **({"record_of_expert": list(layer.record_of)} if layer.shares_records else {}),
    }


def _parts_to_json(parts: Iterable[Part]) -> dict[str, Any]:
    return {p.name: {"shape": list(p.shape), "dtype": DTYPE_NAMES[p.dtype]} for p in parts}


def _codec_from_json(content: Mapping[str, Any]) -> CodecChoice:
    return CodecChoice(str(content["name"]), _size(content["group_size"]))


def _encoded_from_json(content: Mapping[str, Any]) -> EncodedResident | None:
    if content["version"] == PLAIN_VERSION or "resident_codec" not in content:
        return None
    codec = _codec_from_json(content["resident_codec"])
    matrices = {}
    for name, part in content["encoded"].items():
        outputs, inputs = map(_size, part["shape"])
        matrices[name] = Part(name, (outputs, inputs), _DTYPES[part["dtype"]])
        codec.make().layout((outputs, inputs))
    if not matrices.keys() <= content["resident"].keys():
        raise ValueError("an encoded matrix that is no resident tensor")
    return EncodedResident(codec, matrices)


def _layer_from_json(content: Mapping[str, Any]) -> PackedLayer:
    table = [_codec_from_json(codec) for codec in content["codecs"]]
    matrices = tuple(
        Part(_known(name, _MATRICES), tuple(map(_size, shape)), torch.float32)
        for name, shape in content["matrices"].items()
    )
    if any(len(part.shape) != 2 for part in matrices):
        raise ValueError(f"matrices {content['matrices']}")
    vectors = tuple(
        Part(_known(name, _VECTORS), tuple(map(_size, v["shape"])), _DTYPES[v["dtype"]])
        for name, v in content["vectors"].items()
    )
    numbers = content["codec_of_expert"]
    if not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise ValueError(f"codec_of_expert {numbers}")
    codecs = tuple(table[number] for number in numbers)
    record_of = tuple(map(int, content.get("record_of_expert", range(len(codecs)))))
    if len(record_of) != len(codecs) or any(
        not 0 <= at < len(codecs) or record_of[at] != at or codecs[at] != codec
        for at, codec in zip(record_of, codecs, strict=False)
    ):
        raise ValueError(f"record_of_expert {record_of}")
    path, index = str(content["path"]), int(content["layer_index"])
    return PackedLayer(path, index, matrices, vectors, codecs, record_of)


def _size(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"size {value!r}")
    return value


def _known(name: str, names: tuple[str, ...]) -> str:
    if name not in names:
        raise ValueError(f"{name!r} is none of {', '.join(names)}")
    return name
