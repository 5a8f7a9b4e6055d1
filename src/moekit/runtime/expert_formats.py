"""How the native kernels read the experts of a packed layer."""

from __future__ import annotations

import functools

import torch

from moekit.core.packed import CodecChoice, PackedLayer
from moekit.ops.native.formats import expert_format, matrix_format
from moekit.ops.native.structures import ExpertFormat


def formats_of_layer(
    layer: PackedLayer, activation: str, *, alpha: float = 0.0, limit: float = 0.0
) -> list[ExpertFormat] | None:
    """The format of each expert whose records, all planes one after the other, lie at an address.

    `activation`, `alpha` and `limit` are those of `ops.native.formats.expert_format`. Experts of
    one codec share their format. None where the kernels cannot read a codec or the biases.
    """

    @functools.cache
    def made(choice: CodecChoice) -> ExpertFormat | None:
        return _expert_format(layer, layer.codecs.index(choice), activation, alpha, limit)

    found = [made(choice) for choice in layer.codecs]
    formats = [made for made in found if made is not None]
    return formats if len(formats) == len(found) else None


def _expert_format(
    layer: PackedLayer, expert: int, activation: str, alpha: float, limit: float
) -> ExpertFormat | None:
    codec = layer.codecs[expert].make()
    places: dict[str, list[dict[str, int]]] = {matrix.name: [] for matrix in layer.matrices}
    biases: dict[str, int] = {}
    start = 0
    for plane in range(codec.num_planes):
        record = layer.record(expert, plane)
        for offsets in places.values():
            offsets.append({})
        for stored in record.arrays:
            if stored.owner in places:
                places[stored.owner][plane][stored.part.name] = start + stored.offset
            else:
                biases[stored.owner] = start + stored.offset
        start += record.size
    shapes = {matrix.name: (matrix.shape[0], matrix.shape[1]) for matrix in layer.matrices}
    matrices = {name: matrix_format(codec, shapes[name], at) for name, at in places.items()}
    usable = {name: made for name, made in matrices.items() if made is not None}
    dtypes = {vector.dtype for vector in layer.vectors}
    if len(usable) < len(matrices) or not {"up", "down"} <= usable.keys() or len(dtypes) > 1:
        return None
    return expert_format(
        usable,
        activation,
        alpha=alpha,
        limit=limit,
        biases=biases,
        bias_dtype=next(iter(dtypes), torch.float32),
    )
