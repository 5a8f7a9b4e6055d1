"""`moekit show`."""

from __future__ import annotations

from typing import Annotated

import typer

from moekit.cli.common import JsonOption, NoSeedOption, output
from moekit.core.registry import Method, registry


def show(
    name: Annotated[str, typer.Argument(metavar="METHOD", help="A name from `moekit list`.")],
    kind: Annotated[
        str | None, typer.Option("--kind", metavar="KIND", help="Where two kinds share a name.")
    ] = None,
    seed: NoSeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Show one method: paper, needs, options, limits."""
    with output(as_json) as out:
        method = registry.find(name, kind=kind)
        out.line(f"{method.name} ({method.kind}): {method.title}")
        out.line()
        out.table(_facts(method))
        if method.options:
            out.line()
            out.table(
                [
                    (o.name, o.type, "required" if o.required else repr(o.default), o.help)
                    for o in method.options
                ],
                header=("option", "type", "default", ""),
            )
        out.result(method.to_dict())


def _facts(method: Method) -> list[tuple[str, str]]:
    lossless = {True: "lossless", False: "lossy", None: ""}[method.lossless]
    settings = ", ".join(f"{key}={value!r}" for key, value in method.settings.items())
    facts = {
        "paper": method.paper,
        "needs": ", ".join(method.needs) or "nothing",
        "output": lossless,
        "limits": method.limits,
        "preset": settings,
        "code": method.target,
    }
    return [(name, text) for name, text in facts.items() if text]
