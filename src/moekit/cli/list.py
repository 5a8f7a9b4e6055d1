"""`moekit list`."""

from __future__ import annotations

from typing import Annotated

import typer

from moekit.cli.common import JsonOption, NoSeedOption, output
from moekit.core.registry import KINDS, NEEDS, registry


def list_methods(
    pattern: Annotated[
        str, typer.Argument(metavar="PATTERN", help="Shell pattern on the name, such as 'top*'.")
    ] = "*",
    kind: Annotated[
        str | None, typer.Option("--kind", metavar="KIND", help=f"One of {', '.join(KINDS)}.")
    ] = None,
    needs: Annotated[
        str | None,
        typer.Option("--needs", metavar="NEED", help=f"One of {', '.join(NEEDS)}, or none."),
    ] = None,
    seed: NoSeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """List the methods moekit has."""
    with output(as_json) as out:
        methods = registry.methods(kind=kind, needs=needs, pattern=pattern)
        out.table(
            [(m.kind, m.name, " ".join(m.needs) or "-", m.title) for m in methods],
            header=("kind", "name", "needs", "title"),
        )
        if not methods:
            out.line("no method matches")
        out.result({"methods": [method.to_dict() for method in methods]})
