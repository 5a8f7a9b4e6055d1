"""The `moekit` command."""

from __future__ import annotations

import io
import sys
from typing import Annotated, Any

import typer

from moekit import __version__
from moekit.cli.errors import reporting_errors
from moekit.cli.lazy import LazyGroup, command_of, load_verb

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
    "sweep": ("moekit.cli.sweep:sweep", "Do the runs of a recipe and compare them."),
    "train": ("moekit.cli.train:train", "Train a model from a recipe."),
    "compress": ("moekit.cli.compress:app", "Make a model smaller, by a plan for its experts."),
    "bench": ("moekit.cli.bench:bench", "Measure a model's speed on this machine."),
    "convert": ("moekit.cli.convert:convert", "Write a model in another layout or format."),
    "merge": ("moekit.cli.merge:merge", "Merge models of one family by a recipe."),
    "upcycle": (
        "moekit.cli.upcycle:upcycle",
        "Make a MoE of dense models or a larger one of a MoE.",
    ),
    "list": ("moekit.cli.list:list_methods", "List the methods moekit has."),
    "show": ("moekit.cli.show:show", "Show one method: paper, needs, options, limits."),
}


def load_function(verb: str) -> Any:
    """The function of a verb, or its app of verbs; imports its module."""
    return load_verb(VERBS, verb)


def load_command(verb: str) -> Any:
    """The command of a verb; imports its module."""
    return command_of(VERBS, verb)


class MainGroup(LazyGroup):
    """The verbs of moekit, with errors reported as lines instead of tracebacks."""

    table = VERBS

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
    cls=MainGroup,
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
