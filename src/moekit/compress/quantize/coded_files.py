"""A packed model of ternary rows with its experts in QMoE's code: below one bit a weight on disk.

    config.json, tokenizer, resident files, packed.json    as in the packed model
    coded.json                                             this header
    coded-00000.safetensors, ...                           the experts of each MoE layer, coded
    NAME.header                                            the header of each file that was coded

Coding is lossless and may be undone: `expand` gives back every file byte for byte. QMoE, arXiv
2310.16795. Experts that another codec encodes stay as they are in the packed model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from moekit.core.checkpoint import read_header, read_json
from moekit.core.errors import UserError
from moekit.core.load import PACKED_FILE
from moekit.core.memory import format_bytes
from moekit.core.packed import ExpertParts, check_record, checksum, read_parts, write_record
from moekit.core.packed_header import PackedHeader
from moekit.core.writer import check_output
from moekit.ops.codecs import Encoded
from moekit.ops.codecs.ternary_rows import TernaryRowsCodec
from moekit.ops.pair_dictionary import CodedRows, decode_rows, encode_rows

CODED_FILE = "coded.json"
FORMAT, VERSION = "moekit.coded", 1
HEADER_SUFFIX = ".header"
# The dictionary's digits of the codec's codes (low, zero, high), and back.
_DIGIT = torch.tensor([1, 0, 2], dtype=torch.uint8)
_CODE = torch.tensor([1, 0, 2], dtype=torch.int32)

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Squeezed:
    """Bytes of the experts packed and coded, and bits of code and levels for each weight."""

    packed_bytes: int
    coded_bytes: int
    bits_per_weight: float


def squeeze(packed: Path, out: Path, *, progress: Progress | None = None) -> Squeezed:
    """Code the experts of the packed model in `packed` into the new directory `out`.

    Holds the coded experts of one layer. Raises `UserError` for a model without experts of the
    codec ternary-rows, a damaged one, and an `out` that exists.
    """
    header = PackedHeader.read(packed)
    check_output(out)
    chosen = [c.make() for layer in header.layers for c in layer.codecs]
    if not any(isinstance(codec, TernaryRowsCodec) for codec in chosen):
        raise UserError(
            f"{packed} has no experts of the codec ternary-rows; make it with moekit compress "
            "quantize --codec ternary-rows."
        )
    partial = _begin(out)
    for file in sorted(packed.iterdir()):
        if file.is_file() and file.name not in header.expert_files:
            shutil.copy2(file, partial)
    places = dict(_places(packed, header))
    for name in header.expert_files:
        (partial / (name + HEADER_SUFFIX)).write_bytes(_raw_header(packed / name))
    packed_bytes = weights = coded_bytes = 0
    for position, layer in enumerate(header.layers):
        tensors: dict[str, Tensor] = {}
        for expert in range(layer.num_experts):
            records = []
            for plane in range(layer.num_planes(expert)):
                name = layer.tensor_name(expert, plane)
                records.append(_read(packed, *places[name]))
                record = records[-1].numpy().data
                wrong = check_record(header, position, expert, plane, record, checksum(record))
                if wrong is not None:
                    raise UserError(f"{packed}: the record {name} is damaged: {wrong}.")
                packed_bytes += len(records[-1])
            parts = read_parts(layer, expert, records)
            if isinstance(parts.codec, TernaryRowsCodec):
                tensors |= _coded(expert, parts)
            else:
                tensors |= {f"{expert}.{plane}": r for plane, r in enumerate(records)}
            weights += sum(matrix.shape[0] * matrix.shape[1] for matrix in layer.matrices)
        coded_bytes += sum(tensor.nbytes for tensor in tensors.values())
        save_file(tensors, partial / _layer_file(position))
        if progress is not None:
            progress(position + 1, len(header.layers))
    sizes = {name: (packed / name).stat().st_size for name in header.expert_files}
    content = {"format": FORMAT, "version": VERSION, "id": header.id, "sizes": sizes}
    (partial / CODED_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.rename(out)
    return Squeezed(packed_bytes, coded_bytes, 8 * coded_bytes / weights)


def expand(coded: Path, out: Path, *, progress: Progress | None = None) -> None:
    """Undo `squeeze`: the packed model, every file as it was, in the new directory `out`.

    Raises `UserError` for what is no coded model, is damaged, or an `out` that exists.
    """
    if not (coded / CODED_FILE).is_file():
        raise UserError(f"{coded} is no coded model: it has no {CODED_FILE}.")
    content = read_json(coded / CODED_FILE)
    header = PackedHeader.read(coded)
    found = (content.get("format"), content.get("version"), content.get("id"))
    sizes = dict(content.get("sizes") or {})
    known = set(sizes) == set(header.expert_files)
    if found != (FORMAT, VERSION, header.id) or not known:
        raise UserError(f"{coded / CODED_FILE} does not belong to the {PACKED_FILE} beside it.")
    check_output(out)
    partial = _begin(out)
    own = {CODED_FILE, *(_layer_file(at) for at in range(len(header.layers)))}
    for file in sorted(coded.iterdir()):
        if file.is_file() and file.name not in own and file.suffix != HEADER_SUFFIX:
            shutil.copy2(file, partial)
    for name in header.expert_files:
        shutil.copyfile(coded / (name + HEADER_SUFFIX), partial / name)
        with (partial / name).open("r+b") as whole:
            whole.truncate(sizes[name])
    places = dict(_places(partial, header))
    for position, layer in enumerate(header.layers):
        try:
            tensors = load_file(coded / _layer_file(position))
        except (OSError, SafetensorError) as error:
            raise UserError(f"{coded / _layer_file(position)} cannot be read: {error}") from None
        for expert in range(layer.num_experts):
            shapes = {m.name: (m.shape[0], m.shape[1]) for m in layer.matrices}
            parts = _decoded(expert, tensors, shapes)
            for plane in range(layer.num_planes(expert)):
                file_name, offset, size = places[layer.tensor_name(expert, plane)]
                record = (
                    tensors[f"{expert}.{plane}"]
                    if parts is None
                    else write_record(header, position, expert, plane, parts)[0]
                )
                if len(record) != size:
                    raise UserError(f"{coded}: expert {expert} of {layer.path} is damaged.")
                with (partial / file_name).open("r+b") as target:
                    target.seek(offset)
                    target.write(record.numpy().data)
        if progress is not None:
            progress(position + 1, len(header.layers))
    partial.rename(out)


def describe(squeezed: Squeezed) -> str:
    """One line for people."""
    return (
        f"experts: {format_bytes(squeezed.packed_bytes)} packed, "
        f"{format_bytes(squeezed.coded_bytes)} coded, {squeezed.bits_per_weight:.3f} bits a weight"
    )


def _begin(out: Path) -> Path:
    """An empty directory beside `out` that becomes it."""
    partial = out.with_name(out.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    return partial


def _layer_file(position: int) -> str:
    return f"coded-{position:05d}.safetensors"


def _raw_header(path: Path) -> bytes:
    with path.open("rb") as file:
        length = file.read(8)
        return length + file.read(int.from_bytes(length, "little"))


def _places(directory: Path, header: PackedHeader) -> Iterator[tuple[str, tuple[str, int, int]]]:
    """Where each record lies: name -> (file, offset, bytes)."""
    for name in header.expert_files:
        for key, entry in read_header(directory / name).items():
            yield key, (name, entry.start, entry.stop - entry.start)


def _read(directory: Path, file_name: str, offset: int, size: int) -> Tensor:
    with (directory / file_name).open("rb") as file:
        file.seek(offset)
        return torch.frombuffer(bytearray(file.read(size)), dtype=torch.uint8)


def _coded(expert: int, parts: ExpertParts) -> dict[str, Tensor]:
    assert isinstance(parts.codec, TernaryRowsCodec)
    made: dict[str, Tensor] = {}
    for name, matrix in parts.matrices.items():
        coded = encode_rows(_DIGIT[parts.codec.codes(matrix).long()])
        plane = matrix.planes[0]
        key = f"{expert}.{name}"
        made |= {f"{key}.codes": coded.codes, f"{key}.offsets": coded.offsets}
        made |= {f"{key}.{level}": plane[level].contiguous() for level in ("low", "high")}
    return made | {f"{expert}.{name}": v.contiguous() for name, v in parts.vectors.items()}


def _decoded(
    expert: int, tensors: dict[str, Tensor], shapes: dict[str, tuple[int, int]]
) -> ExpertParts | None:
    """The arrays of a coded expert; None for one whose records are kept."""
    if f"{expert}.0" in tensors:
        return None
    codec, matrices = TernaryRowsCodec(), {}
    for name, shape in shapes.items():
        key = f"{expert}.{name}"
        coded = CodedRows(tensors[f"{key}.codes"], tensors[f"{key}.offsets"], shape[1])
        codes = _CODE[decode_rows(coded).long()]
        grid = {level: tensors[f"{key}.{level}"] for level in ("low", "high")}
        matrices[name] = Encoded(shape, (codec.pack(codes[:, None], grid),))
    prefix = f"{expert}."
    vectors = {
        name: tensor
        for key, tensor in tensors.items()
        if key.startswith(prefix) and (name := key.removeprefix(prefix)).endswith("_bias")
    }
    return ExpertParts(codec, matrices, vectors)
