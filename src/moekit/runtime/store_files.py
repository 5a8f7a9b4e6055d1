"""Where the records of a packed model lie in its files, and whether those are the header's own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moekit.core.checkpoint import read_header
from moekit.core.errors import UserError
from moekit.core.packed import PAGE
from moekit.core.packed_header import EncodedResident, PackedHeader
from moekit.core.packed_resident import matrix_arrays


class StoreError(UserError):
    """A packed model that cannot be read as it was written; names the file and what to do."""


@dataclass(frozen=True)
class Record:
    """A tensor of a file: bytes [size] from `offset` on."""

    file: str
    offset: int
    size: int


def find_records(directory: Path, header: PackedHeader) -> dict[str, Record]:
    """Every tensor of a packed model, by name; reads the headers of its files.

    Raises `StoreError` for files that are missing, cut short or not those that `header` describes.
    """
    found: dict[str, Record] = {}
    for name in (*header.resident_files, *header.expert_files):
        file = directory / name
        if not file.is_file():
            raise StoreError(f"{file} is missing; copy it again or convert the model again.")
        try:
            entries = read_header(file)
        except (UserError, OSError) as error:
            raise StoreError(str(error)) from None
        for tensor, entry in entries.items():
            found[tensor] = Record(name, entry.start, entry.stop - entry.start)
    _check_tensors(directory, header, found)
    return found


def _check_tensors(directory: Path, header: PackedHeader, found: dict[str, Record]) -> None:
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


def _check_encoded(directory: Path, encoded: EncodedResident, found: dict[str, Record]) -> None:
    for name, part in encoded.matrices.items():
        _, size = matrix_arrays(encoded.codec, (part.shape[0], part.shape[1]))
        if name in found and found[name].size != size:
            raise StoreError(
                f"{directory}: {name} has {found[name].size} bytes; {encoded.codec.name} of "
                f"{list(part.shape)} has {size}. Convert the model again."
            )
