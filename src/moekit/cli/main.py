"""The `moekit` command: a group that imports a verb's module only when that verb is asked for."""

from __future__ import annotations

import difflib
import importlib
import io
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from moekit import __version__
from moekit.cli.errors import UsageError, reporting_errors

# verb: (module:function, line for `moekit --help`). A test holds the line against the docstring.
VERBS = {
    "run": ("moekit.cli.run:run", "Generate text from a prompt, or chat."),
    "serve": ("moekit.cli.serve:serve", "Serve a model to clients of OpenAI's API."),
    "inspect": ("moekit.cli.inspect:inspect", "Show a model's experts, parameters and memory."),
    "trace": ("moekit.cli.trace:trace", "Record what the routers choose on a text."),
    "analyze": ("moekit.cli.analyze:analyze", "Measure what the routers do, from traces."),
    "profile": ("moekit.cli.profile:profile", "Measure what each expert does on a text."),
    "report": ("moekit.cli.report:report", "Make a page about what a model's experts do."),
    "eval": ("moekit.cli.eval:evaluate", "Measure bits per byte and perplexity, or run tasks."),
    "compare": (
        "moekit.cli.compare:compare",
        "Set results side by side: size against loss.",
    ),
    "train": ("moekit.cli.train:train", "Train a model from a recipe."),
    "convert": ("moekit.cli.convert:convert", "Write a model in another layout or format."),
    "list": ("moekit.cli.list:list_methods", "List the methods moekit has."),
    "show": ("moekit.cli.show:show", "Show one method: paper, needs, options, limits."),
}


def load_function(verb: str) -> Any:
    """The function of a verb; imports its module."""
    module, _, function = VERBS[verb][0].partition(":")
    return getattr(importlib.import_module(module), function)


def load_command(verb: str) -> Any:
    """The typer command of a verb; imports its module."""
    # Plain help text: rich would cost more start-up time than everything else together.
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(verb)(load_function(verb))
    return typer.main.get_command(app)


class LazyGroup(TyperGroup):
    """A group whose commands are rows of VERBS until they are run.

    Contexts are click's, which typer exports under no public name.
    """

    def list_commands(self, ctx: Any) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return load_command(cmd_name) if cmd_name in VERBS else None

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl([(name, line) for name, (_, line) in VERBS.items()])

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in VERBS and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], VERBS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"verbs are {', '.join(VERBS)}"
            raise UsageError(f"no verb {args[0]!r}: {hint}", ctx)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        # Inside, because typer itself turns Ctrl-C into a silent exit.
        with reporting_errors():
            return super().invoke(ctx)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"moekit {__version__}")
        raise typer.Exit


app = typer.Typer(
    name="moekit",
    cls=LazyGroup,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


@app.callback()
def moekit(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print version."),
    ] = False,
) -> None:
    """One toolkit for the whole life of a Mixture-of-Experts model.

    MODEL is a local directory, a hub id, or babel, the small model that comes with moekit.
    """


def entry(args: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 2 for a request that cannot be met, 130 Ctrl-C."""
    args = sys.argv[1:] if args is None else args
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Models write every script, whatever the locale says.
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    with reporting_errors():
        if args == ["list"]:
            # typer checks options with pydantic, whose import takes longer than all the rest.
            return load_function("list")()
        command = typer.main.get_command(app)
        code = command.main(args or ["--help"], prog_name="moekit", standalone_mode=False)
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    entry()
