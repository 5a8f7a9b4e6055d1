"""How the native kernels read the experts of a packed layer."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from moekit.core.packed import CodecChoice, PackedLayer
from moekit.ops.native.formats import expert_format, matrix_format
from moekit.ops.native.structures import ExpertFormat


def formats_of_layer(
    layer: PackedLayer,
    activation: str,
    *,
    alpha: float = 0.0,
    limit: float = 0.0,
    planes: int | None = None,
) -> list[ExpertFormat] | None:
    """The format of each expert whose records, all planes one after the other, lie at an address.

    With `planes` only the first so many lie there. `activation`, `alpha` and `limit` are those of
    `ops.native.formats.expert_format`. Experts of one codec share their format. None where the
    kernels cannot read a codec or the biases.
    """

    @functools.cache
    def made(choice: CodecChoice) -> ExpertFormat | None:
        return _expert_format(layer, layer.codecs.index(choice), activation, alpha, limit, planes)

    found = [made(choice) for choice in layer.codecs]
    formats = [made for made in found if made is not None]
    return formats if len(formats) == len(found) else None


@dataclass(frozen=True)
class RecordPlaces:
    """Where the arrays of an expert begin, in bytes from its record, all planes one after the
    other: for each matrix by plane and name, for each bias."""

    matrices: dict[str, list[dict[str, int]]]
    biases: dict[str, int]


def record_places(layer: PackedLayer, expert: int, planes: int | None = None) -> RecordPlaces:
    """Where the arrays of the record of an expert begin, or of its first `planes` planes."""
    found = RecordPlaces({matrix.name: [] for matrix in layer.matrices}, {})
    start = 0
    for plane in range(layer.num_planes(expert) if planes is None else planes):
        record = layer.record(expert, plane)
        for offsets in found.matrices.values():
            offsets.append({})
        for stored in record.arrays:
            if stored.owner in found.matrices:
                found.matrices[stored.owner][plane][stored.part.name] = start + stored.offset
            else:
                found.biases[stored.owner] = start + stored.offset
        start += record.size
    return found


def _expert_format(
    layer: PackedLayer,
    expert: int,
    activation: str,
    alpha: float,
    limit: float,
    planes: int | None,
) -> ExpertFormat | None:
    codec, places = layer.codecs[expert].make(), record_places(layer, expert, planes)
    shapes = {matrix.name: (matrix.shape[0], matrix.shape[1]) for matrix in layer.matrices}
    matrices = {
        name: matrix_format(codec, shapes[name], at) for name, at in places.matrices.items()
    }
    usable = {name: made for name, made in matrices.items() if made is not None}
    dtypes = {vector.dtype for vector in layer.vectors}
    if len(usable) < len(matrices) or not {"up", "down"} <= usable.keys() or len(dtypes) > 1:
        return None
    return expert_format(
        usable,
        activation,
        alpha=alpha,
        limit=limit,
        biases=places.biases,
        bias_dtype=next(iter(dtypes), torch.float32),
    )
