"""`pack`: stream a checkpoint into a packed model directory, expert by expert."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

from moekit.core.architecture import read_config
from moekit.core.checkpoint import Checkpoint, TensorInfo
from moekit.core.codec_choice import DEFAULT_CODEC
from moekit.core.convert import (
    check_fit,
    check_request,
    plan_hash,
    prepare,
    rewrite_options,
)
from moekit.core.deferred import Deferred
from moekit.core.errors import UserError
from moekit.core.expert_source import expert_sources
from moekit.core.layout import FUSED
from moekit.core.load import PACKED_FILE
from moekit.core.pack_records import PackedSource, records
from moekit.core.packed import PAGE, CodecChoice
from moekit.core.packed_header import PackedHeader
from moekit.core.packed_resident import encoded_parts
from moekit.core.plan import ExpertPlan
from moekit.core.registry import register
from moekit.core.rewrite import Rewrite
from moekit.core.shards import Shard, plan_shards
from moekit.core.write_model import Converted, state_of, write_model
from moekit.core.writer import DEFAULT_SHARD_BYTES

PACKED = "packed"
RESIDENT, EXPERTS = "resident", "experts"


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
    rewrite: Rewrite | None = None,
    codec: str | None = None,
    group_size: int | None = None,
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

    `plan` changes the experts and `rewrite` computes their values; layers may keep different
    numbers of experts, and router rows that lead to one expert share its record. The bits of a plan
    choose the codec of single experts, of the same kind as `codec`, which is int4 in groups of 32
    unless given, or the one that the rewrite encodes with. `resident_codec` encodes the matrices of
    attention, of dense and shared MLPs and the output head, which then open without work. `dtype`
    is that of what is not encoded. Memory does not grow with the model. The rest is as for
    `convert`.

    Raises `UserError` as `convert` does, and for experts that the codec cannot hold.
    """
    source, target = Path(model), Path(out)
    default = _codec(codec, group_size, rewrite)
    default.make()
    kept = None if resident_codec is None else CodecChoice(resident_codec, default.group_size)
    if kept is not None:
        kept.make()
    plan = check_request(source, target, plan, dtype, overwrite)
    check_fit(plan, rewrite)
    options = {
        "to": PACKED,
        **rewrite_options(plan, rewrite, default),
        "codec": default.name,
        "group_size": default.group_size,
        "dtype": dtype,
        "plan": plan_hash(plan),
        "copy_code": copy_code,
    }
    if kept is not None:
        options["resident_codec"] = resident_codec
    with Checkpoint(source) as checkpoint:
        work = prepare(
            checkpoint,
            FUSED,
            plan,
            dtype,
            target,
            rewrite=rewrite,
            codec=default,
            uneven=True,
            align=default.group_size,
        )
        if work.unused:
            work.result.notes.append(f"Left out {len(work.unused)} tensors that no layer uses.")
        used = {name: t for name, t in work.tensors.items() if name not in work.unused}
        config = read_config(work.config)
        sources = [
            PackedSource(source, work.computed.get(source.spec.layer_index))
            for source in expert_sources(used, config)
        ]
        layers = tuple(source.describe(plan, default) for source in sources)
        routed = {name for each in sources for name in each.source.names}
        resident = {name: tensor for name, tensor in used.items() if name not in routed}
        encoded = None
        if kept is not None:
            resident, encoded = encoded_parts(resident, config, kept)
        identity = json.dumps([options, state_of(checkpoint)]).encode()
        name = hashlib.sha256(identity).hexdigest()[:32]
        header = PackedHeader(name, layers, {}, (), (), encoded)
        experts = dict(records(header, sources))
        shards = {
            RESIDENT: plan_shards(_infos(resident), max_shard_bytes, RESIDENT),
            EXPERTS: plan_shards(_infos(experts), max_shard_bytes, EXPERTS, PAGE),
        }
        header = dataclasses.replace(
            header,
            resident_files=tuple(shard.file for shard in shards[RESIDENT]),
            expert_files=tuple(shard.file for shard in shards[EXPERTS]),
        )
        work.tensors = {**resident, **experts}
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
            plan=plan,
            shards=[*shards[RESIDENT], *shards[EXPERTS]],
            header=lambda paths: _header_file(header, shards[RESIDENT], resident, paths),
        )


def _codec(codec: str | None, group_size: int | None, rewrite: Rewrite | None) -> CodecChoice:
    """The codec that was asked for, or the one that the rewrite encodes with."""
    fitted = getattr(rewrite, "codec", None)
    default = fitted or DEFAULT_CODEC
    asked = CodecChoice(codec or default.name, group_size or default.group_size)
    if fitted is not None and asked != fitted:
        raise UserError(
            f"--codec {asked.name} in groups of {asked.group_size}: the values are fitted to "
            f"{fitted.name} in groups of {fitted.group_size}."
        )
    return asked


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
