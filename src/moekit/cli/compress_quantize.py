"""`moekit compress quantize`."""

from __future__ import annotations

import dataclasses
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moekit.cli.common import (
    Dtype,
    DtypeOption,
    JsonOption,
    ModelArgument,
    Output,
    SeedOption,
    ThreadsOption,
    check_out,
    open_model,
    output,
    progress,
)
from moekit.cli.compress_finish import Destination, finish
from moekit.cli.compress_keep import protected_experts
from moekit.cli.compress_options import (
    BatchSizeOption,
    DataOption,
    EvalOption,
    MaxTokensOption,
    OutArgument,
    PlanOnlyOption,
    SaveStatsOption,
    SeqLenOption,
    StatsOption,
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
    write_format,
)
from moekit.core.errors import UserError

if TYPE_CHECKING:
    from moekit.compress.calibrate import Calibration
    from moekit.compress.quantize.planning import QuantizeRequest
    from moekit.compress.quantize.run import Quantized
    from moekit.core.spec import MoESpec

SHOWN = 8


class Allocation(StrEnum):
    """How bits are shared among the experts of a layer."""

    uniform = "uniform"
    mc_moe = "mc-moe"


def quantize(
    model: ModelArgument,
    out: OutArgument = None,
    method: Annotated[
        str,
        typer.Option(
            metavar="NAME[:OPTION=VALUE,...]",
            help="How codes are found (`moekit list --kind quantizer`), with options as "
            "gptq:damp=0.1 or awq:solver=gptq.",
        ),
    ] = "gptq",
    bits_avg: Annotated[
        float | None,
        typer.Option(
            "--bits-avg",
            min=1.0,
            max=16.0,
            help="In place of one width: one of --widths for each expert, so many bits on average.",
        ),
    ] = None,
    widths: Annotated[
        str | None,
        typer.Option(metavar="BITS,BITS[,...]", help="What --bits-avg mixes; 1,2,3 unless given."),
    ] = None,
    allocate: Annotated[
        Allocation | None,
        typer.Option(help="Who gets which width: mc-moe with --bits-avg, uniform without."),
    ] = None,
    router_bits: Annotated[
        int | None,
        typer.Option(min=2, max=8, help="Round the routers as well, keeping their choices."),
    ] = None,
    protect: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE|LAYER:EXPERT",
            help="Experts that keep 16 bits: those that a plan protects, or one, as 3:17; "
            "repeatable.",
        ),
    ] = None,
    stats: StatsOption = None,
    data: DataOption = None,
    max_tokens: MaxTokensOption = None,
    seq_len: SeqLenOption = None,
    batch_size: BatchSizeOption = 8,
    all_tokens: Annotated[
        bool,
        typer.Option("--all-tokens", help="Fit every expert to all tokens, not to its own alone."),
    ] = False,
    quota: Annotated[
        int | None,
        typer.Option(
            min=1, help="Read more of --data until each expert has so many tokens, if it can."
        ),
    ] = None,
    save_stats: SaveStatsOption = None,
    to: Annotated[Format, typer.Option("--to", help="Format of OUT.")] = Format.packed,
    plan_only: PlanOnlyOption = None,
    evaluate: EvalOption = None,
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
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Store the experts in fewer bits a weight.

    With --to packed the codes are stored as they were found; other formats get the values that the
    codes stand for. Attention, shared experts, embeddings and the head keep their format, unless
    --resident-codec (packed) says otherwise; routers unless --router-bits does.
    """
    with output(as_json) as printed:
        formats = FormatOptions(
            to,
            dtype,
            max_shard_size,
            # What the rewrite encodes with is the format's codec as well.
            None if to is Format.packed else codec,
            None if to is Format.packed else group_size,
            resident_codec,
            gguf_type,
            gguf_pre,
            copy_code,
            overwrite,
            restart,
            dry_run,
        )
        destination = Destination(
            "quantize", model, out, plan_only, formats, seed, threads, tuple(evaluate or ())
        )
        destination.check()
        if save_stats is not None:
            check_out(save_stats)
        from moekit.compress.calibrate import Calibration
        from moekit.compress.quantize.run import forecast_of, request_of
        from moekit.core.codec_choice import DEFAULT_CODEC
        from moekit.core.load import find_config
        from moekit.core.packed import CodecChoice
        from moekit.core.spec import spec_from_config

        # The widths of a mix are those of integers with zero points.
        name = codec or (DEFAULT_CODEC.name if bits_avg is None else "int3-zp")
        request = request_of(
            method,
            CodecChoice(name, group_size or DEFAULT_CODEC.group_size),
            bits_average=bits_avg,
            widths=None if widths is None else _widths(widths),
            allocation=None if allocate is None else allocate.value,
            router_bits=router_bits,
            protect=protected_experts(protect or []),
        )
        spec = spec_from_config(find_config(model))
        request.check(spec)
        calibration = None
        if stats is not None or data or request.sets:
            calibration = Calibration(
                stats, tuple(data or ()), max_tokens, seq_len, batch_size, seed, all_tokens
            )
        _check_text(calibration, quota, save_stats, all_tokens)
        forecast = forecast_of(request, spec, seed)
        formats.check(forecast.plan)
        if plan_only is None and not dry_run:
            # What the format cannot hold is refused before the text is read.
            assert out is not None
            trial = dataclasses.replace(formats, dry_run=True)
            write_format(destination.source, out, trial, forecast.plan, forecast.rewrite)
        if dry_run:
            printed.line("values and widths are found by the run; the forecast rounds to nearest")
            made = forecast
        else:
            made = _decide(
                printed, destination, spec, request, calibration, quota, save_stats, threads
            )
        settings = {
            "method": method,
            "codec": name,
            "group_size": request.codec.group_size,
            "bits_avg": bits_avg,
            "widths": widths,
            "allocate": request.allocation,
            "router_bits": router_bits,
            "protect": protect,
            **(calibration.to_dict() if calibration else {}),
        }
        _print_fallbacks(printed, made)
        finish(printed, destination, made.plan, made.rewrite, data=settings, numbers=made.numbers)


def _widths(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--widths {text} are not numbers of bits, as 2,3,4") from None


def _check_text(
    calibration: Calibration | None, quota: int | None, save_stats: Path | None, all_tokens: bool
) -> None:
    text = calibration is not None and bool(calibration.data)
    for name, given in (
        ("--quota", quota is not None),
        ("--save-stats", save_stats is not None),
        ("--all-tokens", all_tokens),
    ):
        if given and not text:
            raise UserError(f"{name} is for the text of --data, which is not given")


def _decide(
    printed: Output,
    to: Destination,
    spec: MoESpec,
    request: QuantizeRequest,
    calibration: Calibration | None,
    quota: int | None,
    save_stats: Path | None,
    threads: int | None,
) -> Quantized:
    """Collect what the method needs, and let it plan."""
    from moekit.compress.quantize.run import collect_stats, quantize, stats_at

    collected, loaded, path = None, None, None
    told: dict[str, Any] = {}
    if calibration is not None and request.sets:
        if calibration.stats is not None:
            path = calibration.stats
            collected = stats_at(request, spec, path)
        if calibration.data or request.needs_model:
            loaded = open_model(to.model, Dtype.auto, calibration.seed, threads)
        if calibration.data:
            assert loaded is not None
            with progress("profile", "batches") as advance:
                collected, told = collect_stats(
                    request, loaded, calibration, quota=quota, progress=advance
                )
            if save_stats is not None:
                collected.save(save_stats)
                path = save_stats
    if to.plan_only is not None and collected is not None and path is None:
        raise UserError("a plan alone is of use with its statistics: add --save-stats DIR")
    with progress("plan", "layers") as advance:
        made = quantize(
            request,
            spec,
            collected,
            loaded if request.needs_model else None,
            source=to.source,
            stats_path=path,
            progress=advance,
        )
    made.numbers |= told
    for layer, experts in told.get("below quota", {}).items():
        printed.line(f"layer {layer}: {len(experts)} experts have fewer than {quota} tokens")
    return made


def _print_fallbacks(printed: Output, made: Quantized) -> None:
    """Name the experts that were not fitted to tokens of their own."""
    found = made.rewrite.fallbacks
    for fallback in found[:SHOWN]:
        printed.line(
            f"layer {fallback.layer}, expert {fallback.expert}: {fallback.tokens} tokens; "
            f"{fallback.done}"
        )
    if len(found) > SHOWN:
        printed.line(f"... and {len(found) - SHOWN} more (all in --json)")
