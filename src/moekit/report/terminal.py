"""The conclusions of a report in a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import IO

import numpy as np

from moekit.report.comparison import changes, comparison_rows
from moekit.report.conclusions import Conclusion, conclusions, summary_line
from moekit.report.facts import Facts

SIGNS = {"good": ("✓", "green"), "warn": ("!", "yellow"), "info": ("•", "blue")}
# Idle, then from a quarter of the even share to 4 times and more, by equal factors.
SHADES = " ▁▂▃▄▅▆▇█"
LEGEND = "load by expert: ▁ a quarter of its even share or less, █ four times or more"
LEAST, STEPS_A_DOUBLING = 0.25, 1.75
WIDEST = 64


def print_summary(every: Sequence[Facts], file: IO[str] | None = None) -> None:
    """Print the conclusions that the page holds, and each layer's load as a line."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=file, highlight=False)
    if len(every) == 2:
        before, after = every
        console.print(Text("What changed", style="bold"))
        _print(console, changes(before, after))
        table = Table(box=None, pad_edge=False)
        for name in ("", before.name, after.name, "change"):
            table.add_column(Text(name), justify="left" if not name else "right")
        for row in comparison_rows(before, after):
            table.add_row(*map(Text, row))
        console.print(table)
        console.print()
    for facts in every:
        console.print(Text(facts.name, style="bold"))
        console.print(Text(summary_line(facts)))
        _print(console, conclusions(facts))
        console.print(
            Text(
                "load by expert: ▁ a quarter of its even share or less, █ four times or more",
                style="dim",
            )
        )
        for index, load in zip(facts.usage.layers, facts.usage.load, strict=True):
            console.print(Text(f"layer {index:>3} {load_bar(load)}"))
        console.print()


def load_bar(load: np.ndarray) -> str:
    """One character an expert, or a few experts where there are many; a space: never chosen."""
    width = min(len(load), WIDEST)
    even = max(float(load.mean()), 1e-12)
    groups = [float(part.mean()) / even for part in np.array_split(load, width)]
    return "".join(map(_shade, groups))


def _shade(times: float) -> str:
    if not times:
        return SHADES[0]
    step = 1 + round(STEPS_A_DOUBLING * math.log2(max(times, LEAST) / LEAST))
    return SHADES[min(step, len(SHADES) - 1)]


def _print(console: object, found: Sequence[Conclusion]) -> None:
    from rich.padding import Padding
    from rich.text import Text

    for conclusion in found:
        sign, colour = SIGNS[conclusion.tone]
        text = Text.assemble((f"{sign} ", colour), (conclusion.headline, "bold"))
        console.print(text)  # type: ignore[attr-defined]
        console.print(Padding(Text(conclusion.detail), (0, 0, 0, 2)))  # type: ignore[attr-defined]
