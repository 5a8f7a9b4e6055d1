"""`moekit train`: train a model from a recipe."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from moekit.cli.common import (
    JsonOption,
    ThreadsOption,
    check_out,
    output,
    progress,
    set_up,
)
from moekit.core.errors import UserError


def train(
    recipe: Annotated[
        Path | None, typer.Argument(metavar="RECIPE", help="A YAML recipe.", show_default=False)
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of JSONL files; a file's name up to its dot is its domain."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Directory of the result, or the file of a planned recipe."
        ),
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change a field of the recipe."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, help="Overrules train.seed of the recipe.")
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Discard an unfinished run of this --out.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Forecast parameters, FLOPs, bytes and seconds.")
    ] = False,
    plan_for: Annotated[
        float | None,
        typer.Option(
            "--plan-for",
            metavar="FLOPS",
            help="Train nothing: propose models for this training compute, such as 1e19.",
        ),
    ] = None,
    aim: Annotated[
        str, typer.Option(help="With --plan-for: write to --out the design for loss or reasoning.")
    ] = "loss",
    memory: Annotated[
        float | None,
        typer.Option(help="With --plan-for: gigabytes that parameters and optimiser may take."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda; a GPU is taken where there is one.")
    ] = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train a model from a recipe.

    Works in OUT.partial with checkpoints; OUT appears when the run is complete, and the same
    command resumes an interrupted run exactly where it was. On several processes:
    torchrun --nproc-per-node 2 -m moekit train RECIPE --data DIR --out OUT
    """
    if plan_for is not None:
        with output(as_json) as result:
            _plan(result, plan_for, aim, memory, out)
        return
    for name, value in (("RECIPE", recipe), ("--data", data), ("--out", out)):
        if value is None:
            raise UserError(f"{name} is missing: moekit train RECIPE --data DIR --out OUT")
    assert recipe is not None
    assert data is not None
    assert out is not None
    from moekit.train.recipe import load_recipe

    changes = list(override or [])
    if seed is not None:
        changes.append(f"train.seed={seed}")
    settings = load_recipe(recipe, changes)
    with output(as_json) as result:
        set_up(settings.train.seed, threads)
        if dry_run:
            from moekit.train.forecast import forecast

            plan = forecast(settings)
            result.table(plan.rows())
            result.result(plan.to_dict())
            return
        trained = _train(settings, data, out, restart, device)
        if trained is not None:
            result.line(f"{out}: mean bits per byte {trained['valid']['mean']:.4f} on valid")
            result.table(list(trained["valid"]["by_domain"].items()), ("domain", "bits per byte"))
        result.result(trained or {})


def _plan(result: Any, flops: float, aim: str, memory: float | None, out: Path | None) -> None:
    """Show the designs for `flops`, and write the recipe of the one to `aim` at."""
    import yaml

    from moekit.train.design import plan_for, recipe_of

    if aim not in ("loss", "reasoning"):
        raise UserError(f"--aim {aim}: it is loss or reasoning.")
    plan = plan_for(flops, max_bytes=None if memory is None else memory * 1e9)
    bought = plan.allocation
    result.line(
        f"{flops:.3g} FLOPs: {bought.tokens:.3g} tokens of {bought.flops_per_token:.3g} FLOPs, "
        f"rate {bought.learning_rate:.2g}, {bought.batch_tokens:.3g} tokens a batch"
    )
    marks = {plan.for_loss: "loss", plan.for_reasoning: "reasoning"}
    if plan.for_loss == plan.for_reasoning:
        marks = {plan.for_loss: "both"}
    rows = [
        (
            f"{design.activation:.2%}",
            f"{design.leverage:.2f}",
            f"{design.num_experts} of {design.expert_width}, top-{design.top_k}, "
            f"{design.shared} shared",
            f"{design.layers} x {design.width}",
            f"{design.parameters / 1e6:,.0f}M",
            f"{design.active_parameters / 1e6:,.0f}M",
            f"{design.tokens_per_parameter:.1f}",
            f"{design.training_bytes / 1e9:.1f} GB",
            marks.get(place, ""),
        )
        for place, design in enumerate(plan.designs)
    ]
    header = ("active", "leverage", "experts", "layers", "parameters", "active parameters")
    result.table(rows, (*header, "tokens / parameter", "training state", "best for"))
    for warning in plan.warnings:
        result.line(f"note: {warning}")
    written = None
    if out is not None:
        check_out(out)
        place = plan.for_loss if aim == "loss" else plan.for_reasoning
        recipe = recipe_of(plan, place, f"{flops:.0e} FLOPs for {aim}")
        out.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        result.line(
            f"{out}: recipe of the design for {aim}; moekit train {out} --data DIR --out OUT"
        )
        written = str(out)
    result.result({**plan.to_dict(), "recipe": written})


def _train(
    settings: Any, data: Path, out: Path, restart: bool, device: str | None
) -> dict[str, Any] | None:
    """The run; None on every process but the main one."""
    import shutil

    from moekit.core.record import start_record
    from moekit.train.distributed import join_world, leave_world
    from moekit.train.finish import finish
    from moekit.train.look import final_evaluation
    from moekit.train.loop import train as run_training
    from moekit.train.run import prepare

    check_out(out)
    if not data.is_dir():
        raise UserError(f"--data {data}: not a directory; give a folder of JSONL files.")
    world = join_world(device)
    record = start_record(
        "train",
        {"recipe": settings.to_dict(), "data": str(data), "processes": world.size},
        seed=settings.train.seed,
        inputs=[data],
    )
    partial = out.with_name(out.name + ".partial")
    try:
        if restart and world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        world.barrier()
        with progress("train", "steps") if world.is_main else nullcontext(_silent) as advance:
            say = _say if world.is_main else _silent
            run = prepare(settings, data, partial, world, say, advance)
            last = run_training(run)
        if not world.is_main:
            return None
        score = final_evaluation(run)
        finish(run, out, score, last, record)
        return {"out": str(out), "last": last, "valid": score}
    except KeyboardInterrupt as stop:
        if world.is_main and partial.exists():
            raise KeyboardInterrupt(
                f"stopped; {partial} holds the run: the same command resumes it, "
                "--restart discards it."
            ) from stop
        raise
    finally:
        leave_world()


def _say(text: str) -> None:
    """A line on standard error, above the progress bar if there is one."""
    from tqdm import tqdm

    tqdm.write(text, file=sys.stderr)


def _silent(*_: object) -> None:
    pass
