"""`moekit convert`."""

from __future__ import annotations

import functools
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moekit.cli.common import (
    Dtype,
    DtypeOption,
    JsonOption,
    ModelArgument,
    NoSeedOption,
    Output,
    note,
    output,
    progress,
)
from moekit.core.errors import UserError
from moekit.core.memory import bytes_of, format_bytes

if TYPE_CHECKING:
    from moekit.core.convert import Converted
    from moekit.export.gguf import GgufResult


class Format(StrEnum):
    """How the experts lie in the checkpoint, or another program's format."""

    fused = "fused"
    per_expert = "per-expert"
    packed = "packed"
    gguf = "gguf"


# An option that is not listed is for every format that is a checkpoint directory.
CHECKPOINTS = (Format.fused, Format.per_expert, Format.packed)
ONLY_FOR = {
    "--codec": (Format.packed,),
    "--group-size": (Format.packed,),
    "--resident-codec": (Format.packed,),
    "--gguf-type": (Format.gguf,),
    "--gguf-pre": (Format.gguf,),
}


def convert(
    model: ModelArgument,
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT", help="The directory (gguf: file) to write; appears when it is complete."
        ),
    ],
    to: Annotated[
        Format,
        typer.Option(
            "--to",
            help="fused: one bank of experts per layer, which loads fastest. per-expert: the "
            "layout most models are published in. packed: encoded experts that are read one by "
            "one, for running with less memory than the model. gguf: one file for llama.cpp.",
            show_default=False,
        ),
    ],
    plan: Annotated[
        Path | None,
        typer.Option("--plan", metavar="FILE", help="Apply a plan (JSON): the experts it drops."),
    ] = None,
    dtype: DtypeOption = Dtype.auto,
    max_shard_size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Size of a shard, such as 512MiB; 5GB unless given."),
    ] = None,
    codec: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="How --to packed encodes the experts; int4 unless given (`moekit list --kind "
            "codec`).",
        ),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Columns that share a scale with --to packed: 32 (default), 64, 128."
        ),
    ] = None,
    resident_codec: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="How --to packed encodes attention, shared experts and the output head; unless "
            "given they stay as they are.",
        ),
    ] = None,
    gguf_type: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="Number format with --to gguf: f32, f16 (default), bf16, q8_0, q5_1, q5_0, q4_1, "
            "q4_0 or mxfp4.",
        ),
    ] = None,
    gguf_pre: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="llama.cpp's name of the rule by which the tokenizer splits text, where it is not "
            "recognised.",
        ),
    ] = None,
    copy_code: Annotated[
        bool, typer.Option("--copy-code", help="Also copy Python files; they are never run.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the checkpoint at OUT when done.")
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Discard what an interrupted run left at OUT.partial.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Forecast bytes and seconds, and stop.")
    ] = False,
    seed: NoSeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Write a model in another layout or format."""
    with output(as_json) as printed:
        shard_bytes = None if max_shard_size is None else bytes_of(max_shard_size)
        from moekit.core.load import find_model

        source = find_model(model)

        from moekit.core.plan import ExpertPlan

        loaded = None if plan is None else ExpertPlan.load(plan)
        _refuse_strangers(
            to,
            {
                "--codec": codec,
                "--group-size": group_size,
                "--resident-codec": resident_codec,
                "--gguf-type": gguf_type,
                "--gguf-pre": gguf_pre,
                "--dtype": None if dtype is Dtype.auto else dtype,
                "--max-shard-size": max_shard_size,
                "--copy-code": copy_code or None,
                "--restart": restart or None,
            },
        )
        if to is Format.gguf:
            from moekit.export.gguf import convert_gguf

            with progress("writing", "B") as advance:
                written = convert_gguf(
                    source,
                    out,
                    loaded,
                    gguf_type=gguf_type or "f16",
                    pre=gguf_pre,
                    overwrite=overwrite,
                    dry_run=dry_run,
                    progress=advance,
                    note=note,
                )
            _print_gguf(printed, written, dry_run)
            printed.result({**asdict(written), "dry_run": dry_run})
            return

        from moekit.core.convert import convert as convert_checkpoint
        from moekit.core.writer import DEFAULT_SHARD_BYTES

        write = functools.partial(convert_checkpoint, to=to.value)
        if to is Format.packed:
            from moekit.core.pack import DEFAULT_CODEC, DEFAULT_GROUP_SIZE, pack

            write = functools.partial(
                pack,
                codec=codec or DEFAULT_CODEC,
                group_size=group_size or DEFAULT_GROUP_SIZE,
                resident_codec=resident_codec,
            )
        with progress("writing", "B") as advance:
            result = write(
                source,
                out,
                plan=loaded,
                dtype=None if dtype is Dtype.auto else dtype.value,
                max_shard_bytes=shard_bytes or DEFAULT_SHARD_BYTES,
                copy_code=copy_code,
                overwrite=overwrite,
                restart=restart,
                dry_run=dry_run,
                progress=advance,
                note=note,
            )
        if dry_run and loaded is not None:
            printed.line(loaded.table())
        _print_result(printed, result, dry_run)
        printed.result({**asdict(result), "dry_run": dry_run})


def _refuse_strangers(to: Format, given: dict[str, object]) -> None:
    """Raise `UserError` for an option that was given and means nothing for this format."""
    for name, value in given.items():
        if value is None or to in ONLY_FOR.get(name, CHECKPOINTS):
            continue
        instead = "; give --gguf-type" if (to, name) == (Format.gguf, "--dtype") else ""
        raise UserError(f"{name} does not apply to --to {to.value}{instead}.")


def _print_result(out: Output, result: Converted, dry_run: bool) -> None:
    shards = "1 shard" if result.shards == 1 else f"{result.shards} shards"
    size = f"{result.tensors} tensors, {format_bytes(result.bytes)} in {shards}"
    seconds = f"{result.seconds:.1f} s"
    if dry_run:
        out.line(f"would write {result.out}: {size}, {result.layout}; about {seconds}")
    else:
        out.line(f"wrote {result.out}: {size}, {result.layout} from {result.source_layout}")
        out.line(f"in {seconds}")
    _print_experts(out, result.experts)


def _print_gguf(out: Output, result: GgufResult, dry_run: bool) -> None:
    types = ", ".join(f"{count} in {name}" for name, count in result.types.items())
    size = f"{result.tensors} tensors ({types}), {format_bytes(result.bytes)}"
    if dry_run:
        line = f"would write {result.out}: {size}, {result.architecture}; about"
    else:
        line = f"wrote {result.out}: {size}, {result.architecture}; in"
    out.line(f"{line} {result.seconds:.1f} s")
    _print_experts(out, result.experts)


def _print_experts(out: Output, experts: dict[int, tuple[int, int]]) -> None:
    for before, after in sorted(set(experts.values())):
        out.line(f"experts per layer: {after} of {before} in {len(experts)} layers")
