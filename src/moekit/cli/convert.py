"""`moekit convert`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from moekit.cli.common import (
    Dtype,
    DtypeOption,
    JsonOption,
    ModelArgument,
    NoSeedOption,
    output,
)
from moekit.cli.formats import (
    CodecOption,
    CopyCodeOption,
    DryRunOption,
    Format,
    FormatOptions,
    GgufPreOption,
    GgufTypeOption,
    GroupSizeOption,
    MaxShardOption,
    OverwriteOption,
    ResidentCodecOption,
    RestartOption,
    print_written,
    write_format,
)


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
            "one, for running with less memory than the model. gguf: one file for llama.cpp. "
            "compressed-tensors: experts as packed integers, for vLLM and transformers.",
            show_default=False,
        ),
    ],
    plan: Annotated[
        Path | None,
        typer.Option(
            "--plan",
            metavar="FILE",
            help="Apply a plan (a JSON file or the directory that holds plan.json) to the experts.",
        ),
    ] = None,
    dtype: DtypeOption = Dtype.auto,
    max_shard_size: MaxShardOption = None,
    codec: CodecOption = None,
    group_size: GroupSizeOption = None,
    resident_codec: ResidentCodecOption = None,
    gguf_type: GgufTypeOption = None,
    gguf_pre: GgufPreOption = None,
    copy_code: CopyCodeOption = False,
    overwrite: OverwriteOption = False,
    restart: RestartOption = False,
    dry_run: DryRunOption = False,
    seed: NoSeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Write a model in another layout or format."""
    with output(as_json) as printed:
        options = FormatOptions(
            to,
            dtype,
            max_shard_size,
            codec,
            group_size,
            resident_codec,
            gguf_type,
            gguf_pre,
            copy_code,
            overwrite,
            restart,
            dry_run,
        )
        from moekit.core.load import find_model
        from moekit.core.plan import ExpertPlan

        source = find_model(model)
        loaded = None if plan is None else ExpertPlan.load(plan)
        options.check(loaded)
        rewrite = None
        if loaded is not None and loaded.fit is not None:
            from moekit.compress.fitted import rewrite_of

            rewrite = rewrite_of(loaded, source)
        result = write_format(source, out, options, loaded, rewrite)
        if dry_run and loaded is not None:
            printed.line(loaded.table())
        print_written(printed, result, dry_run)
        printed.result({**asdict(result), "dry_run": dry_run})
