"""A figure of the page: one or more views of plotly traces and layout as plain dictionaries.

Plain, because colours are named by role (`colours`) until the page knows the reader's scheme.
Plotly reads a small HTML in every label, so text from outside passes through `label`.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

LONGEST_LABEL = 22


@dataclass(frozen=True)
class View:
    """What a figure shows at one time; `label` is its name in the figure's menu."""

    label: str
    data: list[dict[str, Any]]
    layout: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Key:
    """What the colours of a heat map mean: a scale and evenly spaced labels below it."""

    scale: str
    title: str
    labels: tuple[str, ...]


TIMES = ("⅛×", "¼×", "½×", "1×", "2×", "4×", "8×")


@dataclass(frozen=True)
class Figure:
    """Views of one thing, `height` pixels high; `choose` names its menu, `start` is shown first."""

    alt: str
    views: list[View]
    height: int = 320
    choose: str = ""
    start: int = 0
    key: Key | None = None


def label(text: str) -> str:
    """Text from outside as it may stand in a figure."""
    clean = "".join(c if c.isprintable() else "�" for c in text)
    short = clean if len(clean) <= LONGEST_LABEL else clean[: LONGEST_LABEL - 1] + "…"
    return html.escape(short)


def heat(
    z: Sequence[Sequence[float | None]],
    x: Sequence[Any],
    y: Sequence[Any],
    hover: str,
    *,
    scale: str,
    low: float,
    high: float,
    custom: Any = None,
) -> dict[str, Any]:
    """A heat map [Y, X]; `hover` is plotly's template, `custom` fills its customdata."""
    trace: dict[str, Any] = {
        "type": "heatmap",
        "z": z,
        "x": list(x),
        "y": list(y),
        "zmin": low,
        "zmax": high,
        "colorscale": f"@{scale}",
        "showscale": False,
        "xgap": 1,
        "ygap": 1,
        "hoverongaps": False,
        "hovertemplate": f"{hover}<extra></extra>",
    }
    if custom is not None:
        trace["customdata"] = custom
    return trace


def line(
    name: str,
    x: Iterable[Any],
    y: Iterable[Any],
    colour: str,
    hover: str,
    *,
    dash: str = "solid",
    markers: bool = True,
) -> dict[str, Any]:
    """A line with its name in the legend."""
    return {
        "type": "scatter",
        "mode": "lines+markers" if markers else "lines",
        "name": name,
        "x": list(x),
        "y": list(y),
        "line": {"color": f"@{colour}", "width": 2, "dash": dash},
        "marker": {"color": f"@{colour}", "size": 6},
        "hovertemplate": f"{hover}<extra>{name}</extra>",
    }


def marks(x: Sequence[Any], y: Sequence[Any], symbol: str, name: str) -> dict[str, Any]:
    """Marks on the cells of a heat map, without a hover of their own."""
    ink = {"symbol": symbol, "size": 7, "color": "@ink", "line": {"width": 1.5, "color": "@ink"}}
    return {
        "type": "scatter",
        "mode": "markers",
        "x": list(x),
        "y": list(y),
        "name": name,
        "marker": ink,
        "hoverinfo": "skip",
        "showlegend": False,
    }


def axis(title: str, **more: Any) -> dict[str, Any]:
    """An axis with its title."""
    return {"title": {"text": title}, **more}


# Categories from top to bottom, as a table would have them.
DOWNWARDS = {"autorange": "reversed", "type": "category"}
HEAT_MARGIN = {"t": 6}
