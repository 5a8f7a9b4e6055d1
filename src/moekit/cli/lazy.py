"""A command group that imports a verb's module only when that verb is asked for."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from typing import Any, ClassVar

import typer
from typer.core import TyperGroup

from moekit.cli.errors import UsageError

# verb -> (module:object, line for the help). The object is a function, or a typer app of verbs.
Table = Mapping[str, tuple[str, str]]


def load_verb(table: Table, verb: str) -> Any:
    """The function or app of a verb; imports its module."""
    module, _, name = table[verb][0].partition(":")
    return getattr(importlib.import_module(module), name)


def command_of(table: Table, verb: str) -> Any:
    """The command of a verb; imports its module."""
    found = load_verb(table, verb)
    if isinstance(found, typer.Typer):
        return typer.main.get_command(found)
    # Plain help text: rich would cost more start-up time than everything else together.
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(verb)(found)
    return typer.main.get_command(app)


class LazyGroup(TyperGroup):
    """A group whose commands are rows of `table` until they are run; subclasses give the table.

    Contexts are click's, which typer exports under no public name.
    """

    table: ClassVar[Table] = {}

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.table)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return command_of(self.table, cmd_name) if cmd_name in self.table else None

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl([(name, line) for name, (_, line) in self.table.items()])

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.table and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], self.table, n=1)
            hint = f"did you mean {near[0]}?" if near else f"verbs are {', '.join(self.table)}"
            raise UsageError(f"no verb {args[0]!r}: {hint}", ctx)
        return super().resolve_command(ctx, args)
