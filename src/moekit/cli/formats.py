"""The formats that `convert` and `compress` write, their options, and what is printed of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moekit.cli.common import Dtype, Output, note, progress
from moekit.core.errors import UserError
from moekit.core.memory import bytes_of, format_bytes

if TYPE_CHECKING:
    from moekit.core.plan import ExpertPlan
    from moekit.core.rewrite import Rewrite
    from moekit.core.write_model import Converted
    from moekit.export.gguf import GgufResult


class Format(StrEnum):
    """How the experts lie in the checkpoint, or another program's format."""

    fused = "fused"
    per_expert = "per-expert"
    packed = "packed"
    gguf = "gguf"
    compressed_tensors = "compressed-tensors"


# An option that is not listed is for every format that is a checkpoint directory.
CHECKPOINTS = (Format.fused, Format.per_expert, Format.packed, Format.compressed_tensors)
ENCODED = (Format.packed, Format.compressed_tensors)
ONLY_FOR = {
    "--codec": ENCODED,
    "--group-size": ENCODED,
    "--resident-codec": (Format.packed,),
    "--gguf-type": (Format.gguf,),
    "--gguf-pre": (Format.gguf,),
}
# Of a plan with bits the codec says how they are rounded, whatever the format.
FOR_BITS = ("--codec", "--group-size")

MaxShardOption = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Size of a shard, such as 512MiB; 5GB unless given."),
]
CodecOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="How --to packed and compressed-tensors encode experts, and how the bits of a plan "
        "are rounded; int4 unless given (`moekit list --kind codec`).",
    ),
]
GroupSizeOption = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Columns that share a scale: 32 (default), 64, 128; with compressed-tensors also 0, "
        "a whole row.",
    ),
]
ResidentCodecOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="How --to packed encodes attention, shared experts and the output head; unless "
        "given they stay as they are.",
    ),
]
GgufTypeOption = Annotated[
    str | None,
    typer.Option(
        metavar="TYPE",
        help="Number format with --to gguf: f32, f16 (default), bf16, q8_0, q5_1, q5_0, q4_1, "
        "q4_0 or mxfp4.",
    ),
]
GgufPreOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="llama.cpp's name of the rule by which the tokenizer splits text, where it is not "
        "recognised.",
    ),
]
CopyCodeOption = Annotated[
    bool, typer.Option("--copy-code", help="Also copy Python files; they are never run.")
]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace the checkpoint at OUT when done.")
]
RestartOption = Annotated[
    bool, typer.Option("--restart", help="Discard what an interrupted run left at OUT.partial.")
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Forecast bytes and seconds, and stop.")
]


@dataclass(frozen=True)
class FormatOptions:
    """What was asked of the output; None is the default of the format."""

    to: Format
    dtype: Dtype = Dtype.auto
    max_shard_size: str | None = None
    codec: str | None = None
    group_size: int | None = None
    resident_codec: str | None = None
    gguf_type: str | None = None
    gguf_pre: str | None = None
    copy_code: bool = False
    overwrite: bool = False
    restart: bool = False
    dry_run: bool = False

    def check(self, plan: ExpertPlan | None) -> None:
        """Raise `UserError` for an option that was given and means nothing for the format."""
        given: Mapping[str, object] = {
            "--codec": self.codec,
            "--group-size": self.group_size,
            "--resident-codec": self.resident_codec,
            "--gguf-type": self.gguf_type,
            "--gguf-pre": self.gguf_pre,
            "--dtype": None if self.dtype is Dtype.auto else self.dtype,
            "--max-shard-size": self.max_shard_size,
            "--copy-code": self.copy_code or None,
            "--restart": self.restart or None,
        }
        rounds = plan is not None and "bits" in plan.uses()
        for name, value in given.items():
            allowed = ONLY_FOR.get(name, CHECKPOINTS)
            if value is None or self.to in allowed or (rounds and name in FOR_BITS):
                continue
            instead = "; give --gguf-type" if (self.to, name) == (Format.gguf, "--dtype") else ""
            raise UserError(f"{name} does not apply to --to {self.to.value}{instead}.")


def write_format(
    source: Path,
    out: Path,
    options: FormatOptions,
    plan: ExpertPlan | None = None,
    rewrite: Rewrite | None = None,
) -> Converted | GgufResult:
    """Write the model at `source` to `out`, with a bar, by the one writer of the format."""
    options.check(plan)
    with progress("writing", "B") as advance:
        made: Converted | GgufResult = _writer(options)(
            source,
            out,
            plan=plan,
            rewrite=rewrite,
            overwrite=options.overwrite,
            dry_run=options.dry_run,
            progress=advance,
            note=note,
        )
    return made


def _writer(options: FormatOptions) -> Callable[..., Any]:
    from moekit.core.codec_choice import DEFAULT_CODEC
    from moekit.core.packed import CodecChoice

    asked = CodecChoice(
        options.codec or DEFAULT_CODEC.name, options.group_size or DEFAULT_CODEC.group_size
    )
    if options.to is Format.gguf:
        from moekit.export.gguf import convert_gguf

        return functools.partial(
            convert_gguf, gguf_type=options.gguf_type or "f16", pre=options.gguf_pre, codec=asked
        )
    from moekit.core.writer import DEFAULT_SHARD_BYTES

    shared: dict[str, Any] = {
        "dtype": None if options.dtype is Dtype.auto else options.dtype.value,
        "max_shard_bytes": bytes_of(options.max_shard_size or DEFAULT_SHARD_BYTES),
        "copy_code": options.copy_code,
        "restart": options.restart,
    }
    if options.to is Format.packed:
        from moekit.core.pack import pack

        return functools.partial(
            pack,
            codec=options.codec,
            group_size=options.group_size,
            resident_codec=options.resident_codec,
            **shared,
        )
    if options.to is Format.compressed_tensors:
        from moekit.export.compressed_tensors import convert_compressed_tensors

        size = DEFAULT_CODEC.group_size if options.group_size is None else options.group_size
        return functools.partial(
            convert_compressed_tensors, codec=asked.name, group_size=size, **shared
        )
    from moekit.core.convert import convert

    return functools.partial(convert, to=options.to.value, codec=asked, **shared)


def print_written(out: Output, result: Converted | GgufResult, dry_run: bool) -> None:
    """What was written, or would be."""
    from moekit.core.write_model import Converted

    if isinstance(result, Converted):
        shards = "1 shard" if result.shards == 1 else f"{result.shards} shards"
        size = f"{result.tensors} tensors, {format_bytes(result.bytes)} in {shards}"
        kind, source = result.layout, f" from {result.source_layout}"
    else:
        types = ", ".join(f"{count} in {name}" for name, count in result.types.items())
        size = f"{result.tensors} tensors ({types}), {format_bytes(result.bytes)}"
        kind, source = result.architecture, ""
    if dry_run:
        out.line(f"would write {result.out}: {size}, {kind}; about {result.seconds:.1f} s")
    else:
        out.line(f"wrote {result.out}: {size}, {kind}{source}")
        out.line(f"in {result.seconds:.1f} s")
    for before, after in sorted(set(result.experts.values())):
        layers = list(result.experts.values()).count((before, after))
        out.line(f"experts per layer: {after} of {before} in {layers} layers")
