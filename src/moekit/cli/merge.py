"""`moekit merge`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from moekit.cli.before_and_after import Evaluation, complete, measured, rows
from moekit.cli.common import JsonOption, SeedOption, ThreadsOption, note, output, progress
from moekit.cli.compress_options import EvalOption, SeqLenOption
from moekit.core.errors import UserError
from moekit.core.memory import bytes_of, format_bytes

SMALLEST_SHARD = 2**20


def merge(
    recipe: Annotated[
        Path,
        typer.Argument(
            metavar="RECIPE", help="YAML file, as mergekit's or with steps.", show_default=False
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
    max_shard_size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Size of a shard, such as 512MiB; 5GB unless given."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a model at OUT when the new one is done.")
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Discard what an interrupted merge left.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the recipe and the models, and stop.")
    ] = False,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            help='Text for methods that learn from it, in place of the recipe: JSONL with "text", '
            "plain text, directories of both; repeatable.",
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Read so many tokens of it for each model; 65536 by default."),
    ] = None,
    seq_len: SeqLenOption = None,
    evaluate: EvalOption = None,
    before: Annotated[
        str | None,
        typer.Option(
            "--eval-before",
            metavar="MODEL",
            help="The model that --eval measures before; the base or first of the recipe.",
            show_default=False,
        ),
    ] = None,
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Merge models of one family by a recipe.

    Tensors are read, merged and written one after another, so memory does not grow with the models.
    An interrupted merge goes on when the same command is given again.
    """
    with output(as_json) as printed:
        from moekit.cli.common import set_up
        from moekit.merge.recipe import load_merge, with_text

        size = None if max_shard_size is None else bytes_of(max_shard_size)
        if size is not None and size < SMALLEST_SHARD:
            raise UserError(f"--max-shard-size {max_shard_size} is below 1 MiB")
        text = {"files": tuple(data) if data else None, "max_tokens": max_tokens}
        text["seq_len"] = seq_len
        recipes = [with_text(one, text) for one in load_merge(recipe)]
        set_up(seed, threads)
        from moekit.merge.run import run_recipe

        evaluation = Evaluation(() if dry_run else tuple(evaluate or ()), seed, threads)
        evaluation.check()
        samples = evaluation.samples()
        source = before or recipes[0].reference
        quality = evaluation.quality(source, samples) if samples else None
        with progress("merge", "B") as update, _parts() as told:
            result = run_recipe(
                recipes,
                out,
                seed=seed,
                overwrite=overwrite,
                restart=restart,
                dry_run=dry_run,
                progress=update,
                told=told,
                note=note,
                **({} if size is None else {"max_shard_bytes": size}),
            )
        models = list(dict.fromkeys(model for one in recipes for model in one.models))
        steps = {one.name for one in recipes}
        models = [model for model in models if model not in steps]
        done = "would write" if dry_run else "wrote"
        printed.line(
            f"{done} {result.tensors} tensors, {format_bytes(result.bytes)}, from {len(models)} "
            f"models of {format_bytes(result.source_bytes)} together"
        )
        if not dry_run:
            printed.line(f"{out}: {result.seconds:.1f} s")
        found: dict[str, Any] = {}
        if quality is not None:
            after = evaluation.quality(str(out), samples)
            found, lines = measured(quality, after), rows(quality, after)
            printed.table(list(lines.items()))
            # Tables go by method and file: the recipe itself lies beside the model.
            names = [one.method or "several methods" for one in recipes]
            told_of = {"method": " then ".join(names), "file": recipe.stem, "model": source}
            complete(out, found, lines, told_of)
        printed.result(
            {
                "out": str(out),
                "dry_run": dry_run,
                "models": models,
                "tensors": result.tensors,
                "bytes": result.bytes,
                "source_bytes": result.source_bytes,
                "resumed_bytes": result.resumed_bytes,
                "seconds": result.seconds,
                **found,
            }
        )


@contextmanager
def _parts() -> Iterator[Callable[[str, int, int], None]]:
    """A callback (what, done, all) that draws what is found out before the merge."""
    from tqdm import tqdm

    with tqdm(disable=None, leave=False) as bar:

        def update(what: str, done: int, total: int) -> None:
            bar.set_description(what, refresh=False)
            bar.total = total
            bar.update(done - bar.n)

        yield update
