"""`moekit upcycle`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moekit.cli.before_and_after import Evaluation, complete, measured, rows
from moekit.cli.common import (
    Dtype,
    DtypeOption,
    JsonOption,
    SeedOption,
    ThreadsOption,
    note,
    output,
    progress,
)
from moekit.cli.compress_options import EvalOption
from moekit.cli.formats import DryRunOption, MaxShardOption, OverwriteOption, RestartOption
from moekit.core.errors import UserError
from moekit.core.memory import bytes_of, format_bytes
from moekit.core.method_text import parse_method

SMALLEST_SHARD = 2**20
DEFAULT_METHOD = "sparse"
RECIPES = (".yaml", ".yml")


def upcycle(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A local directory, a hub id or babel; or a YAML file as mergekit-moe's.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT",
            help="The directory to write; appears when it is complete.",
            show_default=False,
        ),
    ],
    method: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[:OPTION=VALUE,...]",
            help="The converter; sparse unless given (`moekit list --kind upcycler`).",
            show_default=False,
        ),
    ] = None,
    others: Annotated[
        list[str] | None,
        typer.Option(
            "--from", metavar="MODEL", help="A model whose parts become experts; repeatable."
        ),
    ] = None,
    experts: Annotated[
        int | None, typer.Option(min=1, help="Experts of a layer, where the method asks for them.")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Experts for a token, where the method asks.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            help='Text for methods that learn from it: JSONL with "text", plain text, directories '
            "of both; repeatable. The domain is the file name up to its first dot.",
        ),
    ] = None,
    stats: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Statistics of MODEL: a directory of moekit profile."),
    ] = None,
    to: Annotated[
        str,
        typer.Option(
            metavar="LAYOUT", help="fused (one bank per layer) or per-expert, as in convert."
        ),
    ] = "fused",
    dtype: DtypeOption = Dtype.auto,
    check: Annotated[
        bool,
        typer.Option(
            "--check/--no-check",
            help="Measure what the method says of step 0, and write nothing where it fails.",
        ),
    ] = True,
    evaluate: EvalOption = None,
    max_shard_size: MaxShardOption = None,
    overwrite: OverwriteOption = False,
    restart: RestartOption = False,
    dry_run: DryRunOption = False,
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Make a MoE of dense models or a larger one of a MoE.

    Or, back, a dense model of a MoE. Every method says what the result computes before any
    training, and that is measured. Tensors are written one after another, so memory does not grow
    with the model; an interrupted run goes on when the same command is given again.
    """
    with output(as_json) as printed:
        from moekit.cli.common import set_up

        size = None if max_shard_size is None else bytes_of(max_shard_size)
        if size is not None and size < SMALLEST_SHARD:
            raise UserError(f"--max-shard-size {max_shard_size} is below 1 MiB")
        asked = {"experts": experts, "top_k": top_k}
        given = {key: value for key, value in asked.items() if value is not None}
        number_format = None if dtype is Dtype.auto else dtype.value
        set_up(seed, threads)
        from moekit.upcycle.run import Request
        from moekit.upcycle.run import upcycle as run

        if Path(model).suffix in RECIPES:
            if method is not None or others or given:
                raise UserError(
                    f"{model} says what is done: leave --method, --from and counts out."
                )
            from moekit.upcycle.moe_recipe import load_moe_recipe

            request = load_moe_recipe(Path(model), to=to, dtype=number_format)
        else:
            name, options = parse_method(method or DEFAULT_METHOD)
            request = Request(
                name,
                model,
                tuple(others or ()),
                options | given,
                dtype=number_format,
                to=to,
                data=tuple(data or ()),
            )
        evaluation = Evaluation(() if dry_run else tuple(evaluate or ()), seed, threads)
        evaluation.check()
        samples = evaluation.samples()
        before = evaluation.quality(request.base, samples) if samples else None
        with progress("upcycle", "B") as update:
            result = run(
                request,
                out,
                seed=seed,
                stats=stats,
                check=check,
                overwrite=overwrite,
                restart=restart,
                dry_run=dry_run,
                progress=update,
                note=note,
                **({} if size is None else {"max_shard_bytes": size}),
            )
        done = "would write" if dry_run else "wrote"
        printed.line(
            f"{done} a {result.model_type} of {format_bytes(result.bytes)} in {result.tensors} "
            f"tensors, from {format_bytes(result.source_bytes)}"
        )
        printed.line(result.start.text)
        if result.measured is not None:
            printed.line(f"measured: logits differ by {result.measured:.3g} of the largest")
        if not dry_run:
            printed.line(f"{out}: {result.seconds:.1f} s")
        found: dict[str, Any] = {}
        if before is not None:
            after = evaluation.quality(str(out), samples)
            found, lines = measured(before, after), rows(before, after)
            printed.table(list(lines.items()))
            complete(out, found, lines)
        printed.result(
            {
                "out": str(out),
                "dry_run": dry_run,
                "model_type": result.model_type,
                "tensors": result.tensors,
                "bytes": result.bytes,
                "source_bytes": result.source_bytes,
                "start": result.start.to_dict(),
                "start_measured": result.measured,
                "numbers": result.numbers,
                "notes": result.notes,
                "resumed_bytes": result.resumed_bytes,
                "seconds": result.seconds,
                **found,
            }
        )
