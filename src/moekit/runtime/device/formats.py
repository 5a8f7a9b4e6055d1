"""How the Triton kernels read the experts of a packed layer."""

from __future__ import annotations

import functools

import torch

from moekit.core.errors import UserError
from moekit.core.layer import MoELayer
from moekit.core.packed import CodecChoice, PackedLayer
from moekit.ops.triton.formats import ExpertFormat, matrix_format
from moekit.runtime.expert_formats import record_places
from moekit.runtime.native_experts import activation_of


def device_formats(layer: MoELayer, packed: PackedLayer) -> list[ExpertFormat]:
    """The format of each expert of a layer; experts of one codec share it.

    Raises UserError for a layer that computes more than gate, up and down, for an activation and
    for a codec that the kernels lack.
    """
    found = None
    if type(layer) is MoELayer and not getattr(layer.experts, "has_post_expert_norm", False):
        found = activation_of(layer.experts)
    if found is None:
        raise UserError(
            f"--device: the GPU kernels cannot compute the experts of {packed.path} "
            f"({type(layer.experts).__name__}); leave out --device to run them on the processor"
        )
    activation, alpha, limit = found
    dtypes = {vector.dtype for vector in packed.vectors} or {torch.float32}

    @functools.cache
    def made(choice: CodecChoice) -> ExpertFormat:
        codec, places = choice.make(), record_places(packed, packed.codecs.index(choice))
        matrices = {
            part.name: matrix_format(
                codec, (part.shape[0], part.shape[1]), places.matrices[part.name]
            )
            for part in packed.matrices
        }
        up, down = matrices.get("up"), matrices.get("down")
        if None in matrices.values() or up is None or down is None or len(dtypes) > 1:
            raise UserError(
                f"--device: the GPU kernels cannot read the codec {choice.name} of {packed.path}; "
                "pack the model again with int8, int4, int3, int2, a nested codec or bf16"
            )
        return ExpertFormat(
            matrices.get("gate"),
            up,
            down,
            activation,
            alpha=alpha,
            limit=limit,
            bias_dtype=next(iter(dtypes)),
            **places.biases,
        )

    return [made(choice) for choice in packed.codecs]
