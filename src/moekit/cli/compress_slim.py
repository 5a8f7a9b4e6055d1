"""`moekit compress slim`."""

from __future__ import annotations

import tempfile
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
    open_model,
    output,
    progress,
)
from moekit.cli.compress_finish import Destination, finish
from moekit.cli.compress_options import (
    BatchSizeOption,
    DataOption,
    EvalOption,
    MaxTokensOption,
    OutArgument,
    PlanOnlyOption,
    SeqLenOption,
)
from moekit.cli.formats import (
    CodecOption,
    CopyCodeOption,
    Format,
    FormatOptions,
    GgufPreOption,
    GgufTypeOption,
    GroupSizeOption,
    MaxShardOption,
    OverwriteOption,
    ResidentCodecOption,
    RestartOption,
)
from moekit.core.errors import UserError

if TYPE_CHECKING:
    from moekit.compress.slim.slimming import Slimmed
    from moekit.core.load import LoadedModel
    from moekit.core.spec import MoESpec


def slim(
    model: ModelArgument,
    out: OutArgument = None,
    width: Annotated[
        int | None, typer.Option(min=1, help="Neurons that every expert keeps.")
    ] = None,
    ratio: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Share of the neurons that go.")
    ] = None,
    stages: Annotated[
        int, typer.Option(min=1, help="Prunings, each followed by --steps of training.")
    ] = 2,
    steps: Annotated[
        int, typer.Option(min=0, help="Training steps of a stage; 0 prunes alone.")
    ] = 100,
    learning_rate: Annotated[
        float, typer.Option("--lr", help="Falls to 0 by a cosine in every stage.")
    ] = 1e-4,
    data: DataOption = None,
    max_tokens: MaxTokensOption = None,
    seq_len: SeqLenOption = None,
    batch_size: BatchSizeOption = 8,
    to: Annotated[Format, typer.Option("--to", help="Format of OUT.")] = Format.fused,
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
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Make every expert narrower, with training.

    Neurons go by the sensitivity of a distillation loss, in stages between which the model learns
    again from what it was. Model, original and optimiser are in memory at once; the text is both
    scored and learnt.
    """
    with output(as_json) as printed:
        formats = FormatOptions(
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
        )
        formats.check(None)
        destination = Destination(
            "slim", model, out, plan_only, formats, seed, threads, tuple(evaluate or ())
        )
        destination.check()
        if plan_only is not None and steps:
            raise UserError("a plan holds no trained weights: give OUT, or --steps 0")
        from moekit.compress.calibrate import Calibration, batches_for
        from moekit.compress.slim.slimming import stage_widths
        from moekit.core.load import find_config
        from moekit.core.spec import spec_from_config

        spec = spec_from_config(find_config(model))
        target = _target(spec, width, ratio)
        widths = stage_widths(spec.per_layer[0].expert_width, target, stages)
        calibration = Calibration(None, tuple(data or ()), max_tokens, seq_len, batch_size, seed)
        loaded = open_model(model, Dtype.float32, seed, threads)
        batches = batches_for(loaded, calibration)
        with tempfile.TemporaryDirectory() as folder:
            found = _slimmed(loaded, batches, target, stages, steps, learning_rate)
            if steps:
                _keep_trained(loaded, Path(folder), destination)
            _report(printed, found)
            finish(
                printed,
                destination,
                found.plan,
                data={
                    "method": "slim",
                    "widths": widths,
                    "steps": steps,
                    "learning_rate": learning_rate,
                    **calibration.to_dict(),
                },
                numbers={"losses": found.losses},
            )


def _target(spec: MoESpec, width: int | None, ratio: float | None) -> int:
    """The width asked for; refuses none, both, and layers of different widths."""
    if (width is None) == (ratio is None):
        raise UserError("give either --width or --ratio")
    widths = sorted({layer.expert_width for layer in spec.per_layer})
    if len(widths) > 1:
        raise UserError(f"the experts have widths {widths}; slimming needs one width")
    return round(widths[0] * (1 - ratio)) if ratio is not None else width or 0


def _slimmed(
    loaded: LoadedModel, batches: Any, target: int, stages: int, steps: int, learning_rate: float
) -> Slimmed:
    from moekit.compress.slim.slimming import slim as run
    from moekit.core.view import MoEView

    with progress("slim", "steps") as advance:
        return run(
            MoEView(loaded.model),
            batches,
            target,
            stages=stages,
            steps=steps,
            learning_rate=learning_rate,
            progress=advance,
        )


def _keep_trained(loaded: LoadedModel, folder: Path, destination: Destination) -> None:
    """Write the trained model, still wide, in the original's number format, to cut it there."""
    import torch

    from moekit.core.architecture import read_config

    stored = read_config(destination.source).dtype or torch.bfloat16
    model: Any = loaded.model
    model.to(stored).save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    destination.source = folder


def _report(printed: Output, found: Slimmed) -> None:
    for width, losses in zip(found.widths, found.losses, strict=False):
        if losses:
            printed.line(
                f"width {width}: divergence {losses[0]:.4f} after pruning, {losses[-1]:.4f} at last"
            )
