"""The page about one model, or two side by side."""

from __future__ import annotations

import html
from collections.abc import Sequence

import numpy as np

from moekit import __version__
from moekit.report.comparison import changes, comparison_rows
from moekit.report.conclusions import Conclusion, conclusions, summary_line
from moekit.report.document import NO_SCRIPT, document, figure_html, plotly_bundle
from moekit.report.facts import Facts
from moekit.report.figure import Figure
from moekit.report.sections import Section, sections, table


def render(every: Sequence[Facts]) -> str:
    """The page about one model, or two side by side."""
    bundle = plotly_bundle()
    found = sections(every)
    figures: list[Figure] = []
    body = _overview(every) + "".join(_section(section, every, figures) for section in found)
    links = "".join(
        f'<a href="#{key}">{html.escape(title)}</a>'
        for key, title in [("overview", "Overview"), *((s.key, s.short) for s in found)]
    )
    title = html.escape(" and ".join(facts.name for facts in every))
    return document(
        f"{title}: what the experts do",
        f'<nav aria-label="sections">{links}</nav>\n<main><header><p class=kicker>'
        f"Mixture-of-Experts report</p><h1>{title}</h1></header>{NO_SCRIPT}\n{body}\n"
        f"<footer>{_footer(every)}</footer></main>",
        figures,
        bundle,
        "two" if len(every) == 2 else "one",
    )


def _overview(every: Sequence[Facts]) -> str:
    parts = ['<section id="overview"><h2 class=hidden>Overview</h2>']
    if len(every) == 2:
        before, after = every
        parts.append(f"<h3>What changed</h3>{_cards(changes(before, after))}")
        header = ("", before.name, after.name, "change")
        parts.append(table(header, comparison_rows(before, after)))
    columns = []
    for facts in every:
        name = f"<h3>{html.escape(facts.name)}</h3>" if len(every) == 2 else ""
        columns.append(
            f"<div>{name}<p class=summary>{html.escape(summary_line(facts))}</p>"
            f"{_cards(conclusions(facts))}{_quality(facts)}</div>"
        )
    parts.append(f"<div class=columns>{''.join(columns)}</div></section>")
    return "".join(parts)


def _cards(found: Sequence[Conclusion]) -> str:
    cards = "".join(
        f'<a class="card {c.tone}" href="#{c.section}"><strong>{html.escape(c.headline)}</strong>'
        f"<span>{html.escape(c.detail)}</span></a>"
        for c in found
    )
    return f"<div class=cards>{cards}</div>"


def _quality(facts: Facts) -> str:
    if not facts.bits_per_byte:
        return ""
    mean = float(np.mean(list(facts.bits_per_byte.values())))
    rows = [(name, float(value)) for name, value in sorted(facts.bits_per_byte.items())]
    return (
        f"<details><summary>Quality: {mean:.3f} bits per byte of text (lower is better), mean of "
        f"{len(rows)} domains</summary>{table(('domain', 'bits per byte'), rows)}</details>"
    )


def _section(section: Section, every: Sequence[Facts], figures: list[Figure]) -> str:
    columns = []
    for facts, block in zip(every, section.blocks, strict=True):
        name = f"<h3>{html.escape(facts.name)}</h3>" if len(every) == 2 else ""
        shown = "".join(figure_html(figure, figures) for figure in block.figures)
        columns.append(f"<div>{name}{shown}{block.html}</div>")
    return (
        f'<section id="{section.key}"><h2>{html.escape(section.title)}</h2>'
        f"<p class=lead>{html.escape(section.lead)}</p>"
        f"<div class=columns>{''.join(columns)}</div></section>"
    )


def _footer(every: Sequence[Facts]) -> str:
    lines = []
    for facts in every:
        usage = facts.usage
        line = f"{facts.name}: {facts.tokens:,} tokens in {len(usage.domains)} domains"
        if facts.record is not None:
            record = facts.record
            line += f"; made by moekit {record.command}, seed {record.seed}, {record.started}"
        lines.append(f"<p>{html.escape(line)}</p>")
    lines.append(
        f"<p>moekit {html.escape(__version__)}. This page loads nothing from anywhere.</p>"
    )
    return "".join(lines)
