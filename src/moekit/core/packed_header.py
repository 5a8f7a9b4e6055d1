"""The header of a packed model, `packed.json`: what lies where, checked before anything is read."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moekit.core.checkpoint import DTYPE_NAMES, read_json
from moekit.core.errors import UserError
from moekit.core.load import PACKED_FILE
from moekit.core.packed import CodecChoice, PackedLayer
from moekit.ops.codecs import Part
from moekit.ops.codecs.tiles import TILE_ROWS

FORMAT = "moekit.packed"
# A header has the least version that describes what is there; 3 brought encoded resident matrices,
# 4 records that several experts share.
PLAIN_VERSION, ENCODED_VERSION, SHARED_VERSION = 2, 3, 4
# The order in which the codes of ternary matrices lie, where there are any.
TERNARY = ("ternary", "ternary-zp")
TERNARY_KEY, TERNARY_ORDER = "ternary_order", 2

MATRICES = ("gate", "up", "down")
VECTORS = ("gate_bias", "up_bias", "down_bias")
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


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
        if _has_ternary(self.layers):
            content[TERNARY_KEY] = TERNARY_ORDER
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
        if _has_ternary(made.layers) and content.get(TERNARY_KEY) != TERNARY_ORDER:
            raise ValueError("its ternary codes lie in an older order; convert the model again")
        for layer in made.layers:
            for expert in range(layer.num_experts):
                layer.record(expert, layer.num_planes(expert) - 1)
        return made

    def with_resident(self, resident: Mapping[str, int]) -> PackedHeader:
        return dataclasses.replace(self, resident=resident)


def _has_ternary(layers: Iterable[PackedLayer]) -> bool:
    return any(choice.name in TERNARY for layer in layers for choice in layer.codecs)


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
        Part(_known(name, MATRICES), tuple(map(_size, shape)), torch.float32)
        for name, shape in content["matrices"].items()
    )
    if any(len(part.shape) != 2 for part in matrices):
        raise ValueError(f"matrices {content['matrices']}")
    vectors = tuple(
        Part(_known(name, VECTORS), tuple(map(_size, v["shape"])), _DTYPES[v["dtype"]])
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
