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


class Layout(StrEnum):
    """How the experts lie in the checkpoint."""

    fused = "fused"
    per_expert = "per-expert"
    packed = "packed"


def convert(
    model: ModelArgument,
    out: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="The directory to write; appears when it is complete."),
    ],
    to: Annotated[
        Layout,
        typer.Option(
            "--to",
            help="fused: one bank of experts per layer, which loads fastest. per-expert: the "
            "layout most models are published in. packed: encoded experts that are read one by "
            "one, for running with less memory than the model.",
            show_default=False,
        ),
    ],
    plan: Annotated[
        Path | None,
        typer.Option("--plan", metavar="FILE", help="Apply a plan (JSON): the experts it drops."),
    ] = None,
    dtype: DtypeOption = Dtype.auto,
    max_shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Size of a shard, such as 5GB or 512MiB.")
    ] = "5GB",
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
        shard_bytes = bytes_of(max_shard_size)
        from moekit.core.load import find_model

        source = find_model(model)

        from moekit.core.convert import convert as convert_checkpoint
        from moekit.core.plan import ExpertPlan

        loaded = None if plan is None else ExpertPlan.load(plan)
        if to is not Layout.packed and (codec is not None or group_size is not None):
            raise UserError(f"--codec and --group-size do not apply to --to {to.value}.")
        write = functools.partial(convert_checkpoint, to=to.value)
        if to is Layout.packed:
            from moekit.core.pack import DEFAULT_CODEC, DEFAULT_GROUP_SIZE, pack

            write = functools.partial(
                pack, codec=codec or DEFAULT_CODEC, group_size=group_size or DEFAULT_GROUP_SIZE
            )
        with progress("writing", "B") as advance:
            result = write(
                source,
                out,
                plan=loaded,
                dtype=None if dtype is Dtype.auto else dtype.value,
                max_shard_bytes=shard_bytes,
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


def _print_result(out: Output, result: Converted, dry_run: bool) -> None:
    shards = "1 shard" if result.shards == 1 else f"{result.shards} shards"
    size = f"{result.tensors} tensors, {format_bytes(result.bytes)} in {shards}"
    seconds = f"{result.seconds:.1f} s"
    if dry_run:
        out.line(f"would write {result.out}: {size}, {result.layout}; about {seconds}")
    else:
        out.line(f"wrote {result.out}: {size}, {result.layout} from {result.source_layout}")
        out.line(f"in {seconds}")
    counts = sorted(set(result.experts.values()))
    for before, after in counts:
        out.line(f"experts per layer: {after} of {before} in {len(result.experts)} layers")
