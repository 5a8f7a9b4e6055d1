"""Matrices of the resident part of a packed model that are stored as a codec encodes them.

An encoded matrix is one tensor of bytes [1, n]: the arrays of its planes one after the other, as in
a record, each at a multiple of `ALIGN`. That is how the kernels read it, so it is used where it was
read. Shapes: O output rows, I input columns.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from moekit.core.architecture import meta_model
from moekit.core.deferred import Deferred, Region
from moekit.core.find import find_moe
from moekit.core.packed import ALIGN, CodecChoice, StoredArray
from moekit.core.packed_header import EncodedResident
from moekit.ops.codecs import Encoded, Part
from moekit.ops.codecs.tiles import TILE_ROWS

# Rows are encoded in blocks of so many, whole tiles: the work arrays are several times as large.
BLOCK_ROWS = 32 * TILE_ROWS
# What families with latent attention call that matrix.
FROM_LATENTS = ".kv_b_proj"


@functools.lru_cache
def matrix_arrays(
    choice: CodecChoice, shape: tuple[int, int]
) -> tuple[tuple[tuple[StoredArray, ...], ...], int]:
    """The arrays of each plane of a matrix of `shape`, and the bytes that they take together.

    Raises `UserError` for a shape that the codec cannot hold.
    """
    codec, size, planes = choice.make(), 0, []
    for plane in codec.layout(shape):
        arrays = []
        for part in plane:
            arrays.append(StoredArray(part.name, part, size, codec.tiled))
            size += -(-arrays[-1].nbytes // ALIGN) * ALIGN
        planes.append(tuple(arrays))
    return tuple(planes), size


def encoded_parts(
    resident: Mapping[str, Deferred], config: PretrainedConfig, choice: CodecChoice
) -> tuple[dict[str, Deferred], EncodedResident]:
    """`resident` (by parameter name of the model of `config`) with its matrices encoded, and what
    the header says of them.

    Encoded are linear layers: attention, dense and shared MLPs, the output head. Left as they are:
    routers, which would choose otherwise; what is also an embedding, whose rows are read one by
    one; the matrix from latents to keys and values, which is taken apart by heads; and widths that
    do not split into groups.
    """
    model = meta_model(config)
    routers = {id(p) for site in find_moe(model) if site.router for p in site.router.parameters()}
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    made, parts = dict(resident), {}
    for path, module in model.named_modules():
        weight = resident.get(f"{path}.weight")
        if not isinstance(module, nn.Linear) or weight is None:
            continue
        # One output is the gate of a shared expert: a vector.
        fits = weight.shape[1] % choice.group_size == 0 and weight.shape[0] > 1
        fits = fits and not path.endswith(FROM_LATENTS)
        if fits and id(module.weight) not in routers | embeddings and weight.is_floating_point():
            name = f"{path}.weight"
            made[name] = _encoded(weight, choice)
            parts[name] = Part(name, tuple(weight.shape), weight.dtype)
    return made, EncodedResident(choice, parts)


def encode_matrix(weight: Tensor, choice: CodecChoice) -> Tensor:
    """The bytes [n] of a matrix [O, I], which may be a `Deferred`: it is read block by block."""
    outputs, inputs = weight.shape
    _, size = matrix_arrays(choice, (outputs, inputs))
    made = torch.zeros(size, dtype=torch.uint8)
    for start in range(0, outputs, BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, outputs)
        rows = weight.rows(start, stop) if isinstance(weight, Deferred) else weight[start:stop]
        _write(made, choice, (outputs, inputs), start, choice.make().encode(rows))
    return made


def _encoded(weight: Deferred, choice: CodecChoice) -> Deferred:
    _, size = matrix_arrays(choice, (weight.shape[0], weight.shape[1]))

    def read(region: Region) -> Tensor:
        made = encode_matrix(weight, choice)[None]
        return made[tuple(slice(first, last) for first, last in region)]

    return Deferred((1, size), torch.uint8, read)


def _write(
    made: Tensor, choice: CodecChoice, shape: tuple[int, int], start: int, block: Encoded
) -> None:
    """Put encoded rows from row `start` on into the bytes [n] of their matrix."""
    whole, _ = matrix_arrays(choice, shape)
    blocks, _ = matrix_arrays(choice, block.shape)
    for arrays, parts, values in zip(whole, blocks, block.planes, strict=True):
        for array, part in zip(arrays, parts, strict=True):
            # Rows of an array follow each other, in tiles or not, and a block begins with a tile.
            rows = -(-shape[0] // TILE_ROWS) * TILE_ROWS if array.tiled else shape[0]
            at = array.offset + start * (array.nbytes // rows)
            dataclasses.replace(part, offset=at).write(values[part.part.name], made)


def _encoded_of(encoded: EncodedResident, name: str, stored: Tensor) -> Encoded:
    """The matrix `name` from its bytes [n], views where they are not stored in tiles."""
    part = encoded.matrices[name]
    shape = (part.shape[0], part.shape[1])
    planes, _ = matrix_arrays(encoded.codec, shape)
    return Encoded(
        shape, tuple({array.part.name: array.read(stored) for array in plane} for plane in planes)
    )


def decoded(encoded: EncodedResident, name: str, stored: Tensor) -> Tensor:
    """The matrix `name` [O, I] from its bytes, in the number format that it had."""
    return encoded.codec.make().decode(
        _encoded_of(encoded, name, stored.reshape(-1)), encoded.matrices[name].dtype
    )
