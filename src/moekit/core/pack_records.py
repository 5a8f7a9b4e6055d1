"""The experts of a model as the records of a packed one: encoded one by one when they are written.

Shapes: F expert width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moekit.core.apply_plan import Result, ResultLayer
from moekit.core.codec_choice import codec_at
from moekit.core.deferred import Deferred, Region
from moekit.core.errors import UserError
from moekit.core.expert_source import ExpertSource
from moekit.core.expert_weights import ExpertWeights
from moekit.core.new_experts import MATRICES, NEURON_AXIS, pad_width
from moekit.core.packed import CodecChoice, ExpertParts, PackedLayer, write_record
from moekit.core.packed_header import PackedHeader
from moekit.core.plan import ExpertPlan
from moekit.ops.codecs import Codec, Part


@dataclass(frozen=True)
class PackedSource:
    """One MoE layer to pack: where its experts lie, and those that a plan computes anew."""

    source: ExpertSource
    computed: ResultLayer | None

    def expert(self, slot: int) -> Result:
        """The expert at a place of the router, of the layer's width."""
        if self.computed is None:
            return self.source.read(slot)
        original = self.computed.slots[slot]
        assert original is not None
        made = self.computed.make(original)
        return pad_width(made, self.computed.width) if isinstance(made, ExpertWeights) else made

    def parts(self) -> list[Part]:
        """Name, shape and dtype of the matrices and biases of an expert."""
        found = []
        for name, view in self.source.views(0).tensors().items():
            shape = list(view.shape)
            if self.computed is not None and name in NEURON_AXIS:
                shape[NEURON_AXIS[name]] = self.computed.width
            found.append(Part(name, tuple(shape), view.dtype))
        return found

    def describe(self, plan: ExpertPlan | None, default: CodecChoice) -> PackedLayer:
        """The header's entry for this layer; raises `UserError` for a codec that does not fit."""
        spec, parts = self.source.spec, self.parts()
        ids: list[int | None] = list(range(spec.num_experts))
        if self.computed is not None:
            ids = self.computed.slots
        codecs = []
        for expert in ids:
            asked = None
            if plan is not None and self.computed is not None and expert is not None:
                asked = plan.action(spec.layer_index, expert).bits
            codecs.append(default if asked is None else codec_at(asked, default))
        layer = PackedLayer(
            spec.path,
            spec.layer_index,
            tuple(part for part in parts if part.name in MATRICES),
            tuple(part for part in parts if part.name not in MATRICES),
            tuple(codecs),
            tuple(ids.index(expert) for expert in ids),
        )
        for choice in set(codecs):
            for matrix in layer.matrices:
                try:
                    choice.make().layout((matrix.shape[0], matrix.shape[1]))
                except UserError as error:
                    where = f"{spec.path}, {matrix.name} of the experts"
                    raise UserError(
                        f"--codec {choice.name} does not fit {where}: {error}"
                    ) from None
        return layer


def records(
    header: PackedHeader, sources: Sequence[PackedSource]
) -> Iterator[tuple[str, Deferred]]:
    """Every record of the pack by name, made when it is read."""
    encode = _LastExpert(header, sources)
    for position, layer in enumerate(header.layers):
        for expert in sorted(set(layer.record_of)):
            for plane in range(layer.num_planes(expert)):
                size = layer.record(expert, plane).size
                reader = _record_reader(header, encode, position, expert, plane)
                yield (
                    layer.tensor_name(expert, plane),
                    Deferred((1, size), torch.uint8, reader),
                )


def _record_reader(
    header: PackedHeader, encode: _LastExpert, position: int, expert: int, plane: int
) -> Callable[[Region], Tensor]:
    def read(region: Region) -> Tensor:
        record = write_record(header, position, expert, plane, encode(position, expert))
        return record[tuple(slice(start, stop) for start, stop in region)]

    return read


class _LastExpert:
    """Encodes experts and keeps the last one, because its planes are asked for one by one."""

    def __init__(self, header: PackedHeader, sources: Sequence[PackedSource]) -> None:
        self._header = header
        self._sources = sources
        self._kept: tuple[tuple[int, int], ExpertParts] | None = None

    def __call__(self, position: int, expert: int) -> ExpertParts:
        if self._kept is None or self._kept[0] != (position, expert):
            self._kept = None
            self._kept = (position, expert), self._encode(position, expert)
        return self._kept[1]

    def _encode(self, position: int, expert: int) -> ExpertParts:
        layer = self._header.layers[position]
        codec = layer.codecs[expert].make()
        made = self._sources[position].expert(expert)
        if isinstance(made, ExpertWeights):
            held = made.tensors()
            vectors = {part.name: held[part.name].to(part.dtype) for part in layer.vectors}
            matrices = {}
            for matrix in layer.matrices:
                try:
                    matrices[matrix.name] = codec.encode(held[matrix.name])
                except UserError as error:
                    where = f"{layer.path}, expert {expert}, {matrix.name}"
                    raise UserError(f"{where}: {error}") from None
            return ExpertParts(codec, matrices, vectors)
        for matrix in layer.matrices:
            _check_same_codec(layer, expert, matrix, codec, made)
        vectors = {part.name: made.vectors[part.name].to(part.dtype) for part in layer.vectors}
        return ExpertParts(codec, made.matrices, vectors)


def _check_same_codec(
    layer: PackedLayer, expert: int, matrix: Part, codec: Codec, made: ExpertParts
) -> None:
    shape = (matrix.shape[0], matrix.shape[1])
    encoded = made.matrices[matrix.name]
    arrays = [{n: (tuple(a.shape), a.dtype) for n, a in p.items()} for p in encoded.planes]
    wanted = [{p.name: (p.shape, p.dtype) for p in plane} for plane in codec.layout(shape)]
    if encoded.shape != shape or arrays != wanted or type(made.codec) is not type(codec):
        raise UserError(
            f"{layer.path}, expert {expert}, {matrix.name}: it was encoded otherwise than "
            f"--codec {layer.codecs[expert].name} does; give the codec that the values were "
            "fitted to."
        )
