"""`moekit sweep`."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moekit.cli.common import (
    JsonOption,
    NoSeedOption,
    OutOption,
    ThreadsOption,
    note,
    output,
    write_page,
)
from moekit.core.errors import UserError

if TYPE_CHECKING:
    from moekit.evaluate.sweep_recipe import CalibrateRecipe, SweepRecipe, SweepRun

# Verbs that take MODEL OUT and know --seed, --stats and --eval; merge takes a recipe for MODEL.
MERGE = "merge"
VERBS = (
    "compress prune",
    "compress condense",
    "compress quantize",
    "compress factorize",
    "upcycle",
    MERGE,
)
RECIPE = "recipe"
RECIPE_FILE = "sweep.json"
TABLE_FILE = "comparison.json"
PAGE_FILE = "comparison.html"
# What is left of a result when its weights are not kept.
KEPT = {".json", ".md"}


def sweep(
    recipe: Annotated[
        Path,
        typer.Argument(metavar="RECIPE", help="YAML file with the runs.", show_default=False),
    ],
    out: OutOption,
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep the weights of every result, not its record only.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the runs that are left to do, and stop.")
    ] = False,
    threads: ThreadsOption = None,
    seed: NoSeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Do the runs of a recipe and compare them.

    Runs of one seed share their calibration, and all are measured on the same text. Each leaves a
    directory with its record in --out; the same command goes on where an interrupted one stopped. A
    run that is refused is named at the end, and the others are done.
    """
    with output(as_json) as printed:
        from moekit.evaluate.sweep_recipe import load_sweep

        plan = load_sweep(recipe, VERBS)
        averages = _plain_averages(plan.runs, out)
        runs = [(run, one) for one in plan.seeds for run in (*plan.runs, *averages)]
        left = [(run, one) for run, one in runs if not _done(_place(out, run, one))]
        told = f"{len(runs)} runs, {len(runs) - len(left)} of them done before"
        if dry_run:
            printed.line(told)
            printed.table([(run.name, f"seed {one}") for run, one in left])
            names = [_place(out, run, one).name for run, one in left]
            printed.result({"dry_run": True, "runs": len(runs), "left": names})
            return
        _claim(out, plan)
        for run, models in averages.items():
            write_page(Path(_recipe_of(run)), _plain_average(models))
        printed.line(told)
        refused: dict[str, str] = {}
        for number, (run, one) in enumerate(left, start=1):
            note(f"[{number}/{len(left)}] {run.name}, seed {one}")
            try:
                _run(plan, run, one, out, threads)
            except UserError as error:
                refused[_place(out, run, one).name] = str(error)
                note(f"refused: {error}")
                continue
            if not keep:
                _drop_weights(_place(out, run, one))
        finished = [_place(out, run, one) for run, one in runs if _done(_place(out, run, one))]
        printed.result({"out": str(out), "refused": refused, **_compare(finished, out, printed)})
        for name, reason in refused.items():
            printed.line(f"refused: {name}: {reason}")


def _place(out: Path, run: SweepRun, seed: int) -> Path:
    return out / f"{run.name}_seed-{seed}"


def _done(place: Path) -> bool:
    from moekit.core.record import RECORD_FILE
    from moekit.evaluate.quality import QUALITY

    try:
        record = json.loads((place / RECORD_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return record.get("metrics", {}).get(QUALITY) is not None


def _claim(out: Path, plan: SweepRecipe) -> None:
    """The output is this recipe's; runs may be added to it, but not measured otherwise."""
    import dataclasses

    fixed = {
        "model": plan.model,
        "evaluate": dataclasses.asdict(plan.evaluate),
        "calibrate": None if plan.calibrate is None else dataclasses.asdict(plan.calibrate),
    }
    fixed = json.loads(json.dumps(fixed))
    file = out / RECIPE_FILE
    if file.is_file():
        if json.loads(file.read_text(encoding="utf-8")) != fixed:
            raise UserError(
                f"--out {out} holds runs of another model, calibration or evaluation text; give "
                "another directory."
            )
        return
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise UserError(f"--out {out} exists and holds no sweep; give another directory.")
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(fixed, indent=2) + "\n", encoding="utf-8")


def _run(plan: SweepRecipe, run: SweepRun, seed: int, out: Path, threads: int | None) -> None:
    more = [] if threads is None else ["--threads", str(threads)]
    source, own = plan.model, run.arguments()
    if run.verb == (MERGE,):
        # Merges of different models compare by what one model was before.
        source = _recipe_of(run)
        own = [*run.arguments(without=RECIPE), "--eval-before", plan.model]
    elif plan.calibrate is not None:
        own += ["--stats", str(_calibrated(plan, plan.calibrate, seed, out, more))]
    evaluate = [word for text in _evaluated(plan, out) for word in ("--eval", text)]
    place = [source, str(_place(out, run, seed))]
    _call([*run.verb, *place, *own, *evaluate, "--seed", str(seed), *more])


def _recipe_of(run: SweepRun) -> str:
    recipe = dict(run.options).get(RECIPE)
    if recipe is None:
        raise UserError("a merge in a sweep names its recipe: {verb: merge, recipe: FILE}")
    return str(recipe)


def _plain_averages(runs: tuple[SweepRun, ...], out: Path) -> dict[SweepRun, tuple[str, ...]]:
    """A run of the plain average, with its recipe in `out`, for every set of models that a run
    merges, and those models: no table is without.

    A recipe that cannot be read is refused when its turn comes.
    """
    from moekit.evaluate.sweep_recipe import SweepRun

    merged: dict[frozenset[str], tuple[str, ...]] = {}
    for run in runs:
        if run.verb == (MERGE,):
            with contextlib.suppress(UserError):
                models = _merged_models(Path(_recipe_of(run)))
                merged.setdefault(frozenset(models), models)
    return {
        SweepRun((MERGE,), ((RECIPE, str(out / f"plain-average-{number}.yaml")),)): models
        for number, models in enumerate(merged.values(), start=1)
    }


def _merged_models(recipe: Path) -> tuple[str, ...]:
    """The models that a recipe merges beside its base, in their order."""
    from moekit.merge.recipe import load_merge

    recipes = load_merge(recipe)
    steps = {one.name for one in recipes}
    bases = {one.base for one in recipes}
    named = [model for one in recipes for model in one.models if model not in steps]
    return tuple(dict.fromkeys(model for model in named if model not in bases)) or tuple(named)


def _plain_average(models: tuple[str, ...]) -> str:
    import yaml

    weighted = [{"model": model, "parameters": {"weight": 1}} for model in models]
    return yaml.safe_dump({"merge_method": "linear", "models": weighted})


def _evaluated(plan: SweepRecipe, out: Path) -> list[str]:
    """The texts that every result is measured on, cut to their leading bytes where asked."""
    recipe = plan.evaluate
    if recipe.max_bytes is None:
        return list(recipe.data)
    folder = out / "evaluation"
    if not folder.is_dir():
        from moekit.evaluate.text import limit_bytes_per_domain, read_texts

        partial = out / "evaluation.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for sample in limit_bytes_per_domain(read_texts(recipe.data), recipe.max_bytes):
            with (partial / f"{sample.domain}.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"text": sample.text}, ensure_ascii=False) + "\n")
        partial.rename(folder)
    return [str(folder)]


def _calibrated(
    plan: SweepRecipe, recipe: CalibrateRecipe, seed: int, out: Path, more: list[str]
) -> Path:
    """The statistics that all runs of one seed share, made when the first asks for them."""
    from moekit.core.record import RECORD_FILE

    stats = out / f"calibration_seed-{seed}"
    if (stats / RECORD_FILE).is_file():
        return stats
    shutil.rmtree(stats, ignore_errors=True)
    words = ["profile", plan.model, *recipe.data, "--out", str(stats), "--shuffle"]
    words += ["--max-tokens", str(recipe.max_tokens), "--seed", str(seed)]
    words += [word for name in recipe.sets for word in ("--set", name)]
    words += [] if recipe.seq_len is None else ["--seq-len", str(recipe.seq_len)]
    _call([*words, *more])
    return stats


def _call(words: list[str]) -> None:
    """Run a verb in this process, its own output aside; a refusal is raised as `UserError`."""
    from moekit.cli.errors import UsageError
    from moekit.cli.main import load_command

    command: Any = load_command(words[0])
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            command.main([*words[1:], "--json"], prog_name="moekit", standalone_mode=False)
    except UsageError as error:
        raise UserError(f"{' '.join(words[:2])}: {error.format_message()}") from error


def _drop_weights(place: Path) -> None:
    for file in place.iterdir():
        if file.is_file() and file.suffix not in KEPT:
            file.unlink()


def _compare(finished: list[Path], out: Path, printed: Any) -> dict[str, Any]:
    if not finished:
        raise UserError("no run of the sweep was finished; see the reasons above.")
    from importlib.util import find_spec

    from moekit.evaluate.results import compare_results, read_result
    from moekit.report.front_page import comparison_table, domain_table, front_page

    comparison = compare_results([read_result(place) for place in finished])
    header, rows = comparison_table(comparison)
    printed.table(rows, header)
    if len(comparison.rows[0].domains) > 1:
        header, rows = domain_table(comparison)
        printed.line()
        printed.table(rows, header)
    for line in comparison.notes:
        printed.line(line)
    write_page(out / TABLE_FILE, json.dumps(comparison.to_dict(), indent=2, default=str) + "\n")
    if find_spec("plotly") is not None:
        write_page(out / PAGE_FILE, front_page(comparison, out.name))
        printed.line(f"{out / PAGE_FILE}: the Pareto plot, opens without network")
    return comparison.to_dict()
