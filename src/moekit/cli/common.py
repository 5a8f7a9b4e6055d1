"""What every verb shares: its common options, its output, progress, and checks on --out.

A verb is a function with typer annotations whose body runs inside `output(as_json)`; it writes
for people with `out.line(...)` and hands its machine-readable result to `out.result(...)`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moekit.core.errors import UserError

if TYPE_CHECKING:
    from moekit.core.load import LanguageModel, LoadedModel

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A local directory, a hub id, or babel.", show_default=False
    ),
]
JsonOption = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON object at the end, and nothing else, on stdout."),
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Seed of all random choices.")]
NoSeedOption = Annotated[
    int,
    typer.Option("--seed", min=0, help="As in every verb; nothing is left to chance here."),
]
OutOption = Annotated[
    Path, typer.Option("--out", "-o", help="Where to write; must not exist.", show_default=False)
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Forecast bytes and seconds from a small part, and stop.")
]
ThreadsOption = Annotated[
    int | None,
    typer.Option("--threads", min=1, help="CPU threads; torch's own choice by default."),
]
RemoteCodeOption = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run Python code that comes with the model."),
]


class Dtype(StrEnum):
    """Number formats a model can be loaded in; auto is the one it is stored in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


DtypeOption = Annotated[
    Dtype, typer.Option("--dtype", help="Number format of the weights; auto is as stored.")
]


class Output:
    """Lines for people on standard output, or one JSON object in their place."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.value: dict[str, Any] | None = None

    def line(self, text: str = "") -> None:
        if not self.as_json:
            print(text)

    def table(self, rows: Sequence[Sequence[object]], header: Sequence[str] = ()) -> None:
        """Rows in columns; numbers to the right, everything else to the left."""
        if not self.as_json and rows:
            print("\n".join(table_lines(rows, header)))

    def result(self, value: dict[str, Any]) -> None:
        """The verb's result, printed when the verb is done if --json was given."""
        self.value = value


@contextmanager
def output(as_json: bool) -> Iterator[Output]:
    """Run a verb's body; with --json whatever else is printed goes to standard error."""
    out = Output(as_json)
    if not as_json:
        yield out
        return
    with contextlib.redirect_stdout(sys.stderr):
        yield out
    print(json.dumps(_plain(out.value), ensure_ascii=False, allow_nan=False))


def note(text: str) -> None:
    """A line for people on standard error."""
    print(text, file=sys.stderr)


@contextmanager
def progress(label: str, unit: str) -> Iterator[Callable[[float, int], None]]:
    """A callback (done, total) that draws a bar on standard error if that is a terminal."""
    from tqdm import tqdm

    with tqdm(desc=label, unit=unit, disable=None, leave=False) as bar:

        def update(done: float, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield update


def table_lines(rows: Sequence[Sequence[object]], header: Sequence[str] = ()) -> list[str]:
    """The rows as aligned text."""
    cells = [[str(cell) for cell in row] for row in rows]
    numeric = [
        all(isinstance(row[i], int | float) or _is_number(row[i]) for row in rows)
        for i in range(len(rows[0]))
    ]
    if header:
        cells.insert(0, list(header))
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in cells
    ]


def check_out(out: Path) -> Path:
    """Refuse an --out that exists or whose directory cannot be written, before any work."""
    if out.exists():
        raise UserError(f"--out {out} exists already: choose another path or remove it")
    parent = next(p for p in (out.absolute(), *out.absolute().parents)[1:] if p.exists())
    if not parent.is_dir():
        raise UserError(f"--out {out}: {parent} is not a directory")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"--out {out}: {parent} cannot be written to; choose another path")
    return out


def write_page(out: Path, page: str) -> None:
    """Write an HTML file, whole or not at all; `UserError` where the disk refuses."""
    partial = out.with_name(out.name + ".partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(page, encoding="utf-8")
        os.replace(partial, out)
    except OSError as error:
        raise UserError(f"cannot write --out {out}: {error.strerror}") from error


def set_up(seed: int, threads: int | None = None) -> None:
    """Seed every generator and set the number of CPU threads; imports torch and transformers."""
    import torch
    from transformers import set_seed
    from transformers.utils import logging

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    set_seed(seed)
    if threads is not None:
        torch.set_num_threads(threads)


def open_model(source: str, dtype: Dtype, seed: int, threads: int | None) -> LoadedModel:
    """Seed, set threads, and load a MoE model that has a tokenizer; UserError if it has none.

    A packed one is decoded; a factored one computes through its factors.
    """
    from moekit.core.load import load

    return _opened(source, dtype, seed, threads, load)


def open_language_model(source: str, dtype: Dtype, seed: int, threads: int | None) -> LanguageModel:
    """As `open_model`, for dense models and ensembles too."""
    from moekit.core.load import load_language_model

    return _opened(source, dtype, seed, threads, load_language_model)


def _opened(
    source: str, dtype: Dtype, seed: int, threads: int | None, opener: Callable[..., Any]
) -> Any:
    from moekit.core.load import FACTORED_FILE, PACKED_FILE, resolve_model

    # Before the heavy imports, so that a wrong path is reported at once.
    found = resolve_model(source)
    set_up(seed, threads)
    name = None if dtype is Dtype.auto else dtype.value
    if isinstance(found, Path) and (found / PACKED_FILE).is_file():
        from moekit.runtime.unpack import load_packed

        opener = load_packed
    elif isinstance(found, Path) and (found / FACTORED_FILE).is_file():
        from moekit.compress.factorize.store import load_factored

        opener = load_factored
    loaded = opener(found, name)
    if loaded.tokenizer is None:
        raise UserError(f"{source} has no tokenizer, so it cannot read text")
    return loaded


def _plain(value: Any) -> Any:
    # JSON has no NaN or infinity; null is what readers in other languages expect instead.
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def _is_number(cell: object) -> bool:
    if not isinstance(cell, str):
        return False
    try:
        float(cell.rstrip("%x").replace(",", ""))
    except ValueError:
        return cell in {"", "-"}
    return True
