"""`moekit train`: train a model from a recipe."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from moekit.cli.common import (
    JsonOption,
    OutOption,
    ThreadsOption,
    check_out,
    output,
    progress,
    set_up,
)
from moekit.core.errors import UserError


def train(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE", help="A YAML recipe.", show_default=False)
    ],
    data: Annotated[
        Path,
        typer.Option(help="Folder of JSONL files; a file's name up to its dot is its domain."),
    ],
    out: OutOption,
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
        value = _train(settings, data, out, restart, device)
        if value is not None:
            result.line(f"{out}: mean bits per byte {value['valid']['mean']:.4f} on valid")
            result.table(list(value["valid"]["by_domain"].items()), ("domain", "bits per byte"))
        result.result(value or {})


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
