"""The experts of a model as the records of a packed one: encoded one by one when they are written.

Shapes: F expert width.
"""

from __future__ import annotations

import contextlib
import functools
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
from moekit.core.packed import (
    CodecChoice,
    ExpertParts,
    PackedLayer,
    seal_record,
    write_record,
)
from moekit.core.packed_header import PackedHeader
from moekit.core.plan import ExpertPlan
from moekit.ops import native
from moekit.ops.codecs import Codec, Part
from moekit.ops.codecs.groups import GroupCodec
from moekit.ops.native.encode import encode_tiles, has_encoder
from moekit.ops.native.formats import KINDS


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
        # The record encodes it, with the codec of its bits.
        made = self.computed.unrounded(original)
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
    writer = _RecordWriter(header, sources)
    for position, layer in enumerate(header.layers):
        for expert in sorted(set(layer.record_of)):
            for plane in range(layer.num_planes(expert)):
                size = layer.record(expert, plane).size
                reader = _record_reader(writer, position, expert, plane)
                yield (
                    layer.tensor_name(expert, plane),
                    Deferred((1, size), torch.uint8, reader),
                )


def _record_reader(
    writer: _RecordWriter, position: int, expert: int, plane: int
) -> Callable[[Region], Tensor]:
    def read(region: Region) -> Tensor:
        record = writer.record(position, expert, plane)[None]
        return record[tuple(slice(start, stop) for start, stop in region)]

    return read


class _RecordWriter:
    """Makes records, by the kernels' encoder where it knows the codec. Otherwise the last expert is
    kept, because its planes are asked for one by one."""

    def __init__(self, header: PackedHeader, sources: Sequence[PackedSource]) -> None:
        self._header = header
        self._sources = sources
        self._kept: tuple[tuple[int, int], ExpertParts] | None = None

    @functools.cached_property
    def _pool(self) -> native.Pool | None:
        library = native.library()
        return None if library is None else native.Pool(library, torch.get_num_threads())

    def record(self, position: int, expert: int, plane: int) -> Tensor:
        """The record [n] of one plane of an expert."""
        if self._kept is None or self._kept[0] != (position, expert):
            self._kept = None
            made = self._sources[position].expert(expert)
            codec = self._header.layers[position].codecs[expert].make()
            if isinstance(made, ExpertWeights) and has_encoder(codec) and self._pool is not None:
                return self._encode_into_record(self._pool, codec, position, expert, made)
            self._kept = (position, expert), self._encode(position, expert, codec, made)
        return write_record(self._header, position, expert, plane, self._kept[1])[0]

    def _encode_into_record(
        self,
        pool: native.Pool,
        codec: GroupCodec,
        position: int,
        expert: int,
        made: ExpertWeights,
    ) -> Tensor:
        layer, held = self._header.layers[position], made.tensors()
        layout = layer.record(expert, 0)
        record = torch.zeros(layout.size, dtype=torch.uint8)
        places: dict[str, dict[str, Tensor]] = {}
        for stored in layout.arrays:
            if stored.tiled:
                places.setdefault(stored.owner, {})[stored.part.name] = record[stored.offset :]
            else:
                stored.write(held[stored.owner].to(stored.part.dtype), record)
        for name, place in places.items():
            weight = held[name] if held[name].dtype in KINDS else held[name].float()
            with self._located(layer, expert, name):
                encode_tiles(pool, codec, weight, place["payload"], place["scale"])
        library = native.library()
        assert library is not None
        seal_record(self._header, position, expert, 0, record, library.crc32)
        return record

    def _encode(
        self, position: int, expert: int, codec: Codec, made: ExpertWeights | ExpertParts
    ) -> ExpertParts:
        layer = self._header.layers[position]
        if isinstance(made, ExpertWeights):
            held = made.tensors()
            vectors = {part.name: held[part.name].to(part.dtype) for part in layer.vectors}
            matrices = {}
            for matrix in layer.matrices:
                with self._located(layer, expert, matrix.name):
                    matrices[matrix.name] = codec.encode(held[matrix.name])
            return ExpertParts(codec, matrices, vectors)
        for matrix in layer.matrices:
            _check_same_codec(layer, expert, matrix, codec, made)
        vectors = {part.name: made.vectors[part.name].to(part.dtype) for part in layer.vectors}
        return ExpertParts(codec, made.matrices, vectors)

    @staticmethod
    @contextlib.contextmanager
    def _located(layer: PackedLayer, expert: int, matrix: str) -> Iterator[None]:
        """Say where the values are that a codec refuses."""
        try:
            yield
        except UserError as error:
            raise UserError(f"{layer.path}, expert {expert}, {matrix}: {error}") from None


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
