"""The page of a comparison: size against loss of every row, its Pareto front, and the numbers."""

from __future__ import annotations

import html
from typing import Any

from moekit import __version__
from moekit.core.memory import format_bytes
from moekit.evaluate.results import Comparison, Row, Spread
from moekit.report.document import NO_SCRIPT, document, figure_html, plotly_bundle
from moekit.report.figure import Figure, View, axis, label
from moekit.report.sections import table

COLOURS = ("series1", "series2", "series3", "series4", "series5")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star")


def front_page(comparison: Comparison, title: str) -> str:
    """The HTML file for `comparison`; UserError where plotly is not installed."""
    bundle = plotly_bundle()
    figures: list[Figure] = []
    drawn = figure_html(front_figure(comparison), figures)
    notes = "".join(f"<p class=note>{html.escape(text)}</p>" for text in comparison.notes)
    name = html.escape(title)
    body = (
        f"<main><header><p class=kicker>Comparison</p><h1>{name}</h1></header>{NO_SCRIPT}"
        f"<section><h2>Size and loss</h2><p class=lead>{html.escape(_lead(comparison))}</p>"
        f"{drawn}{notes}</section>"
        f"<section><h2>Numbers</h2>{table(*comparison_table(comparison))}</section>"
        f"<section><h2>By domain</h2>{table(*domain_table(comparison))}</section>"
        f"<footer><p>moekit {html.escape(__version__)}. This page loads nothing from anywhere."
        "</p></footer></main>"
    )
    return document(f"{name}: size and loss", body, figures, bundle, "one")


def comparison_table(comparison: Comparison) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
    """Header and rows: what was done, size, loss over the seeds, increase, seeds."""
    header = ("what", "size", "bits per byte", "increase", "seeds", "on the front")
    rows = [
        (
            row.label,
            format_bytes(row.size),
            row.loss.text(),
            "–" if row.increase is None else f"{row.increase.mean:+.4f}",
            str(len(row.seeds)),
            "yes" if row.on_front else "",
        )
        for row in comparison.rows
    ]
    if comparison.before is not None:
        size = "–" if comparison.size_before is None else format_bytes(comparison.size_before)
        rows.append(("before", size, f"{comparison.before.mean:.4f}", "", "", ""))
    return header, rows


def domain_table(comparison: Comparison) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
    """Header and rows: bits per byte of every domain over the seeds."""
    domains = list(comparison.rows[0].domains)
    rows = [
        (row.label, *(row.domains[domain].text(3) for domain in domains)) for row in comparison.rows
    ]
    if comparison.before is not None:
        bits = comparison.before.bits_per_byte
        rows.append(("before", *(f"{bits[domain]:.3f}" for domain in domains)))
    return ("what", *domains), rows


def front_figure(comparison: Comparison) -> Figure:
    """Size against bits per byte: the mean over domains, and each domain by the menu."""
    domains = list(comparison.rows[0].domains)
    views = [View("mean of the domains", *_view(comparison, None))]
    if len(domains) > 1:
        views += [View(domain, *_view(comparison, domain)) for domain in domains]
    return Figure("Bits per byte by size", views, 460, "Domain")


def _view(comparison: Comparison, domain: str | None) -> tuple[list[dict], dict[str, Any]]:
    data = []
    methods = list(dict.fromkeys(_method(row) for row in comparison.rows))
    for place, method in enumerate(methods):
        rows = [row for row in comparison.rows if _method(row) == method]
        spreads = [_spread(row, domain) for row in rows]
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": label(method),
                "x": [row.size / 1e6 for row in rows],
                "y": [spread.mean for spread in spreads],
                "error_y": {
                    "type": "data",
                    "array": [spread.deviation or 0.0 for spread in spreads],
                    "thickness": 1,
                    "color": f"@{COLOURS[place % len(COLOURS)]}",
                },
                "customdata": [html.escape(row.label) for row in rows],
                "marker": {
                    "color": f"@{COLOURS[place % len(COLOURS)]}",
                    "symbol": SYMBOLS[place // len(COLOURS) % len(SYMBOLS)],
                    "size": 9,
                },
                "hovertemplate": "%{customdata}<br>%{x:.2f} MB, %{y:.4f}<extra></extra>",
            }
        )
    if domain is None:
        front = [row for row in comparison.rows if row.on_front]
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": "Pareto front",
                "x": [row.size / 1e6 for row in front],
                "y": [row.loss.mean for row in front],
                "line": {"color": "@reference", "width": 1.5, "dash": "dot", "shape": "hv"},
                "hoverinfo": "skip",
            }
        )
    layout: dict[str, Any] = {
        "xaxis": axis("size in MB", type="log"),
        "yaxis": axis("bits per byte (lower is better)"),
    }
    if comparison.before is not None:
        before = comparison.before
        level = before.mean if domain is None else before.bits_per_byte[domain]
        edge = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": level, "y1": level}
        layout["shapes"] = [{**edge, "line": {"color": "@reference", "width": 1, "dash": "dash"}}]
    return data, layout


def _method(row: Row) -> str:
    return str(row.settings.get("method", row.settings["command"]))


def _spread(row: Row, domain: str | None) -> Spread:
    return row.loss if domain is None else row.domains[domain]


def _lead(comparison: Comparison) -> str:
    front = sum(row.on_front for row in comparison.rows)
    text = (
        f"{len(comparison.rows)} results, {front} of them on the Pareto front: nothing here is "
        "both smaller and better. Bars are standard deviations over seeds."
    )
    if comparison.before is not None:
        text += f" The dashed line is the model before, {comparison.before.mean:.4f}."
    return text
