"""`pack`: stream a checkpoint into a packed model directory, expert by expert."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moekit.core.architecture import meta_model, read_config
from moekit.core.checkpoint import Checkpoint, TensorInfo
from moekit.core.convert import (
    Converted,
    check_request,
    plan_hash,
    prepare,
    state_of,
    write_model,
)
from moekit.core.deferred import Deferred, Region
from moekit.core.errors import UserError
from moekit.core.expert_weights import ExpertWeights
from moekit.core.find import find_moe
from moekit.core.layer import MoELayer
from moekit.core.layer_spec import LayerSpec, describe_layer, expert_tensors
from moekit.core.layout import FUSED
from moekit.core.packed import (
    PACKED_FILE,
    PAGE,
    CodecChoice,
    ExpertParts,
    PackedHeader,
    PackedLayer,
    write_record,
)
from moekit.core.packed_resident import encoded_parts
from moekit.core.plan import ExpertPlan
from moekit.core.registry import register
from moekit.core.shards import Shard, plan_shards
from moekit.core.spec import spec_from_config
from moekit.core.view import MoEView
from moekit.core.writer import DEFAULT_SHARD_BYTES
from moekit.ops.codecs import Part, make_codec

PACKED = "packed"
DEFAULT_CODEC = "int4"
DEFAULT_GROUP_SIZE = 32
RESIDENT, EXPERTS = "resident", "experts"
_MATRICES = ("gate", "up", "down")


@register(
    "converter",
    PACKED,
    title="Resident part and encoded experts, each one read away, for running",
    needs=("weights",),
    limits="Only moekit reads it.",
    options={
        "codec": "how the experts are encoded (`moekit list --kind codec`)",
        "resident_codec": "how the other matrices are encoded; as they are unless given",
        "group_size": "columns that share a scale: 32, 64 or 128",
    },
)
def pack(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    plan: ExpertPlan | str | os.PathLike[str] | None = None,
    *,
    codec: str = DEFAULT_CODEC,
    group_size: int = DEFAULT_GROUP_SIZE,
    resident_codec: str | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    restart: bool = False,
    copy_code: bool = False,
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> Converted:
    """Write the checkpoint in directory `model` to `out` as `core.packed` describes.

    `plan` drops experts, and its bits (16, 8, 4, 3, 2) choose the codec of single experts, of the
    same kind as `codec`. `resident_codec` encodes the matrices of attention, of dense and shared
    MLPs and the output head, which then open without work. `dtype` is that of what is not encoded.
    Memory does not grow with the model. The rest is as for `convert`.

    Raises `UserError` as `convert` does, and for experts that the codec cannot hold.
    """
    source, target = Path(model), Path(out)
    default = CodecChoice(codec, group_size)
    default.make()
    kept = None if resident_codec is None else CodecChoice(resident_codec, group_size)
    if kept is not None:
        kept.make()
    plan = check_request(source, target, plan, dtype, overwrite)
    options = {
        "to": PACKED,
        "codec": codec,
        "group_size": group_size,
        "dtype": dtype,
        "plan": plan_hash(plan),
        "copy_code": copy_code,
    }
    if kept is not None:
        options["resident_codec"] = resident_codec
    with Checkpoint(source) as checkpoint:
        chosen = _codecs_of(plan, source, default)
        work = prepare(checkpoint, FUSED, _without_bits(plan), dtype, target)
        if work.unused:
            work.result.notes.append(f"Left out {len(work.unused)} tensors that no layer uses.")
        used = {name: t for name, t in work.tensors.items() if name not in work.unused}
        sources = _expert_sources(used, work.config)
        layers = tuple(_packed_layer(spec, views, chosen, default) for spec, views, _ in sources)
        routed = {name for _, _, names in sources for name in names}
        resident = {name: tensor for name, tensor in used.items() if name not in routed}
        encoded = None
        if kept is not None:
            resident, encoded = encoded_parts(resident, read_config(work.config), kept)
        identity = json.dumps([options, state_of(checkpoint)]).encode()
        name = hashlib.sha256(identity).hexdigest()[:32]
        header = PackedHeader(name, layers, {}, (), (), encoded)
        records = dict(_records(header, [views for _, views, _ in sources]))
        shards = {
            RESIDENT: plan_shards(_infos(resident), max_shard_bytes, RESIDENT),
            EXPERTS: plan_shards(_infos(records), max_shard_bytes, EXPERTS, PAGE),
        }
        header = dataclasses.replace(
            header,
            resident_files=tuple(shard.file for shard in shards[RESIDENT]),
            expert_files=tuple(shard.file for shard in shards[EXPERTS]),
        )
        work.tensors = {**resident, **records}
        result = work.result
        result.layout, result.tensors = PACKED, len(work.tensors)
        result.bytes = sum(tensor.nbytes for tensor in work.tensors.values())
        return write_model(
            work,
            checkpoint,
            options,
            max_shard_bytes=max_shard_bytes,
            overwrite=overwrite,
            restart=restart,
            dry_run=dry_run,
            progress=progress,
            note=note,
            shards=[*shards[RESIDENT], *shards[EXPERTS]],
            header=lambda paths: _header_file(header, shards[RESIDENT], resident, paths),
        )


def _infos(tensors: Mapping[str, Deferred]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in tensors.items()}


def _header_file(
    header: PackedHeader,
    shards: list[Shard],
    resident: Mapping[str, Deferred],
    paths: Mapping[str, Path],
) -> tuple[str, str]:
    """Name and content of the header; the resident part is read again for its checksums."""
    sums = {}
    for shard in shards:
        with paths[shard.file].open("rb") as file:
            for name, offset in shard.offsets.items():
                file.seek(offset)
                left, crc = resident[name].nbytes, 0
                while left:
                    block = file.read(min(left, 2**24))
                    crc, left = zlib.crc32(block, crc), left - len(block)
                sums[name] = crc
    return PACKED_FILE, header.with_resident(sums).to_json()


def _without_bits(plan: ExpertPlan | None) -> ExpertPlan | None:
    if plan is None:
        return None
    layers = {
        layer: {e: dataclasses.replace(action, bits=None) for e, action in actions.items()}
        for layer, actions in plan.layers.items()
    }
    return dataclasses.replace(plan, layers=layers)


def _codecs_of(
    plan: ExpertPlan | None, source: Path, default: CodecChoice
) -> dict[int, list[CodecChoice]]:
    """Layer -> the codec of each resulting expert, for the layers whose bits a plan sets."""
    if plan is None or "bits" not in plan.uses():
        return {}
    spec = spec_from_config(source)
    plan.validate(spec)
    found = {}
    for layer in spec.per_layer:
        index = layer.layer_index
        bits = [plan.action(index, e).bits for e in plan.survivors(index, layer.num_experts)]
        found[index] = [default if b is None else _codec_at(b, default) for b in bits]
    return found


def _codec_at(bits: float, default: CodecChoice) -> CodecChoice:
    """The codec of `bits` bits of the same kind as `default`: int4-zp at 3 is int3-zp."""
    if bits == 16:
        return dataclasses.replace(default, name="bf16")
    kind = re.fullmatch(r"(int|nested)\d(-zp)?", default.name)
    prefix, suffix = (kind[1], kind[2] or "") if kind else ("int", "")
    if prefix == "nested" and bits == 2:
        prefix, suffix = "int", "-zp"
    name = f"{prefix}{bits:g}{suffix}"
    try:
        make_codec(name, default.group_size)
    except UserError:
        raise UserError(
            f"The plan asks for {bits:g} bits, and there is no codec {name!r}; with --codec "
            f"{default.name} a plan may use the bits of its kind, and 16."
        ) from None
    return dataclasses.replace(default, name=name)


_Views = Callable[[int], ExpertWeights]


def _expert_sources(
    tensors: Mapping[str, Deferred], config: Mapping[str, Any]
) -> list[tuple[LayerSpec, _Views, list[str]]]:
    """For each MoE layer its description, its experts as deferred matrices, and the names of the
    tensors that hold them."""
    read = read_config(config)
    model = meta_model(read)
    found = []
    for site, layer in zip(find_moe(model), MoEView(model).layers, strict=True):
        spec = describe_layer(site, read)
        prefixes = expert_tensors(site)
        names = []
        for name, _ in list(site.experts.named_parameters()):
            full = f"{site.experts_path}.{name}" if site.experts_path else name
            if not name.startswith(prefixes):
                continue
            if full not in tensors:
                raise UserError(
                    f"{full} is stored under the name of another layer: a model whose layers "
                    "share their experts cannot be packed."
                )
            _replace_parameter(site.experts, name, tensors[full])
            names.append(full)
        _check_coverage(layer, spec)
        found.append((spec, layer.expert_views, names))
    return found


def _replace_parameter(module: nn.Module, name: str, tensor: Deferred) -> None:
    path, _, leaf = name.rpartition(".")
    # A parameter insists on real data; the handles of a layer only read the attribute.
    module.get_submodule(path)._parameters[leaf] = tensor  # type: ignore[assignment]


def _check_coverage(layer: MoELayer, spec: LayerSpec) -> None:
    parts = layer.expert_views(0).tensors().values()
    held = sum(part.numel() for part in parts)
    if held != spec.params_per_expert or not all(isinstance(part, Deferred) for part in parts):
        raise UserError(
            f"{layer.name}: the matrices of an expert have {held} weights, the layer stores "
            f"{spec.params_per_expert} for each; experts of this family cannot be packed."
        )


def _packed_layer(
    spec: LayerSpec,
    views: _Views,
    chosen: Mapping[int, list[CodecChoice]],
    default: CodecChoice,
) -> PackedLayer:
    parts = views(0).tensors()
    codecs = chosen.get(spec.layer_index, [default] * spec.num_experts)
    layer = PackedLayer(
        spec.path,
        spec.layer_index,
        tuple(Part(n, tuple(p.shape), p.dtype) for n, p in parts.items() if n in _MATRICES),
        tuple(Part(n, tuple(p.shape), p.dtype) for n, p in parts.items() if n not in _MATRICES),
        tuple(codecs),
    )
    for choice in set(codecs):
        for matrix in layer.matrices:
            try:
                choice.make().layout((matrix.shape[0], matrix.shape[1]))
            except UserError as error:
                where = f"{spec.path}, {matrix.name} of the experts"
                raise UserError(f"--codec {choice.name} does not fit {where}: {error}") from None
    return layer


def _records(header: PackedHeader, views: list[_Views]) -> Iterator[tuple[str, Deferred]]:
    """Every record of the pack, made when it is read."""
    encode = _LastExpert(header, views)
    for position, layer in enumerate(header.layers):
        for expert in range(layer.num_experts):
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

    def __init__(self, header: PackedHeader, views: list[_Views]) -> None:
        self._header = header
        self._views = views
        self._kept: tuple[tuple[int, int], ExpertParts] | None = None

    def __call__(self, position: int, expert: int) -> ExpertParts:
        if self._kept is None or self._kept[0] != (position, expert):
            self._kept = None
            self._kept = (position, expert), self._encode(position, expert)
        return self._kept[1]

    def _encode(self, position: int, expert: int) -> ExpertParts:
        layer = self._header.layers[position]
        codec = layer.codecs[expert].make()
        matrices, vectors = {}, {}
        for name, part in self._views[position](expert).tensors().items():
            assert isinstance(part, Deferred)
            if name not in _MATRICES:
                vectors[name] = part.read()
                continue
            try:
                matrices[name] = codec.encode(part.read())
            except UserError as error:
                raise UserError(f"{layer.path}, expert {expert}, {name}: {error}") from None
        return ExpertParts(codec, matrices, vectors)
