"""`moekit compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moekit.cli.common import (
    Dtype,
    DtypeOption,
    JsonOption,
    SeedOption,
    ThreadsOption,
    check_out,
    open_model,
    output,
    progress,
    write_page,
)
from moekit.core.errors import UserError

if TYPE_CHECKING:
    from moekit.evaluate.results import RunResult


def compare(
    results: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR...",
            help="Directories that compress, merge, upcycle or a sweep wrote; or directories of "
            "such directories.",
            show_default=False,
        ),
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            "-d",
            metavar="DATA",
            help="Measure every result on this text, instead of what their records say.",
        ),
    ] = None,
    before: Annotated[
        str | None,
        typer.Option("--before", metavar="MODEL", help="What they were made from, as a row."),
    ] = None,
    max_bytes: Annotated[
        int | None, typer.Option(min=1, help="Of --data, only the leading bytes of each domain.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="HTML page to write, with the Pareto plot.")
    ] = None,
    dtype: DtypeOption = Dtype.auto,
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Set results side by side: size against loss.

    Runs that differ in their seed only are one row, with mean and standard deviation, and the rows
    that nothing beats in both size and loss are marked. Results that were measured on different
    text are refused.
    """
    with output(as_json) as printed:
        if out is not None:
            if out.suffix.lower() not in {".html", ".htm"}:
                raise UserError(f"--out {out}: the page is one HTML file, such as {out}.html")
            check_out(out)
        if max_bytes is not None and not data:
            raise UserError("--max-bytes cuts --data, which was not given")
        directories = _directories(results)
        from moekit.evaluate.results import compare_results, read_result
        from moekit.report.document import plotly_bundle
        from moekit.report.front_page import comparison_table, domain_table, front_page

        if out is not None:
            # Before any model runs: a missing package is no reason to wait first.
            plotly_bundle()
        if data:
            found, size = _measure(directories, before, data, max_bytes, dtype, seed, threads)
        else:
            if before is not None:
                raise UserError("--before is measured on --data, which was not given")
            found, size = [read_result(directory) for directory in directories], None
        comparison = compare_results(found, size)
        header, rows = comparison_table(comparison)
        printed.table(rows, header)
        if len(comparison.rows[0].domains) > 1:
            printed.line()
            header, rows = domain_table(comparison)
            printed.table(rows, header)
        for line in comparison.notes:
            printed.line(line)
        if out is not None:
            write_page(out, front_page(comparison, " and ".join(path.name for path in results)))
            printed.line(f"{out}: the Pareto plot, opens without network")
        printed.result({"out": None if out is None else str(out), **comparison.to_dict()})


def _directories(given: list[Path]) -> list[Path]:
    """Those that hold a record, given or one level below."""
    from moekit.core.record import RECORD_FILE

    found: list[Path] = []
    for path in given:
        if not path.is_dir():
            raise UserError(f"{path} is no directory with results")
        inside = [path] if (path / RECORD_FILE).is_file() else sorted(path.iterdir())
        inside = [one for one in inside if (one / RECORD_FILE).is_file()]
        if not inside:
            raise UserError(f"{path} holds no {RECORD_FILE}, nor does a directory in it")
        found += inside
    return found


def _measure(
    directories: list[Path],
    before: str | None,
    data: list[str],
    max_bytes: int | None,
    dtype: Dtype,
    seed: int,
    threads: int | None,
) -> tuple[list[RunResult], int | None]:
    """Every result with its quality on `data`; and the bytes of the model before."""
    import dataclasses

    from moekit.core.checkpoint import Checkpoint
    from moekit.core.load import find_model
    from moekit.evaluate.quality import measure_quality
    from moekit.evaluate.results import read_result
    from moekit.evaluate.text import limit_bytes_per_domain, read_texts

    samples = read_texts(data)
    if max_bytes is not None:
        samples = limit_bytes_per_domain(samples, max_bytes)

    def quality(model: str):
        loaded = open_model(model, dtype, seed, threads)
        with progress(f"eval {Path(model).name}", "windows") as update:
            return measure_quality(loaded.model, loaded.tokenizer, samples, progress=update)

    runs = [read_result(directory) for directory in directories]
    base, size = None, None
    if before is not None:
        base = quality(before)
        with Checkpoint(find_model(before)) as checkpoint:
            size = checkpoint.nbytes
    return [
        dataclasses.replace(run, quality=quality(str(run.directory)), before=base) for run in runs
    ], size
