"""The page: one HTML file that holds its style, its script, its figures and plotly itself."""

from __future__ import annotations

import html
from collections.abc import Sequence
from importlib.resources import files

import numpy as np

from moekit import __version__
from moekit.core.errors import UserError
from moekit.report.colours import DARK, LIGHT, css_variables
from moekit.report.comparison import changes, comparison_rows
from moekit.report.conclusions import Conclusion, conclusions, summary_line
from moekit.report.facts import Facts
from moekit.report.figure import Figure, Key
from moekit.report.page_json import script_json
from moekit.report.sections import Section, sections, table

# Nothing outside of the file may be loaded, whatever is in it.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; font-src data:; base-uri 'none'; form-action 'none'"
)


def plotly_bundle() -> str:
    """The JavaScript of plotly; UserError where it is not installed."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise UserError(
            "a report page needs plotly: pip install 'moekit[report]' "
            "(without --out the summary is printed, which needs nothing more)"
        ) from error
    return str(get_plotlyjs()).replace("</script", "<\\/script")


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
    data = {
        "palettes": {"light": LIGHT, "dark": DARK},
        "figures": [_figure_data(figure) for figure in figures],
    }
    assets = files("moekit.report") / "assets"
    css = (assets / "page.css").read_text(encoding="utf-8")
    script = (assets / "page.js").read_text(encoding="utf-8")
    scheme = (
        f":root{{{css_variables(LIGHT)}}}"
        f"@media (prefers-color-scheme:dark){{:root{{{css_variables(DARK)}}}}}"
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{title}: what the experts do</title>
<style>{scheme}{css}</style></head>
<body class="{"two" if len(every) == 2 else "one"}">
<nav aria-label="sections">{links}</nav>
<main><header><p class=kicker>Mixture-of-Experts report</p><h1>{title}</h1></header>
<noscript><p class=note>The figures need JavaScript.</p></noscript>
{body}
<footer>{_footer(every)}</footer></main>
<script type="application/json" id="data">{script_json(data)}</script>
<script>{bundle}</script>
<script>{script}</script>
</body></html>
"""


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
        shown = "".join(_figure(figure, figures) for figure in block.figures)
        columns.append(f"<div>{name}{shown}{block.html}</div>")
    return (
        f'<section id="{section.key}"><h2>{html.escape(section.title)}</h2>'
        f"<p class=lead>{html.escape(section.lead)}</p>"
        f"<div class=columns>{''.join(columns)}</div></section>"
    )


def _figure(figure: Figure, figures: list[Figure]) -> str:
    number = len(figures)
    figures.append(figure)
    menu = ""
    if len(figure.views) > 1:
        options = "".join(
            f"<option value={place}{' selected' if place == figure.start else ''}>"
            f"{html.escape(view.label)}</option>"
            for place, view in enumerate(figure.views)
        )
        menu = f"<label>{html.escape(figure.choose)} <select>{options}</select></label>"
    alt = html.escape(figure.alt)
    key = "" if figure.key is None else _key(figure.key)
    return (
        f"<figure class=plot data-figure={number}><figcaption><b>{alt}</b>{menu}</figcaption>{key}"
        f'<div class=canvas role=img aria-label="{alt}" style="height:{figure.height}px"></div>'
        "</figure>"
    )


def _key(key: Key) -> str:
    labels = "".join(f"<span>{html.escape(text)}</span>" for text in key.labels)
    return (
        f"<div class=key aria-hidden=true><span>{html.escape(key.title)}</span>"
        f'<div><i style="background:var(--{key.scale})"></i><div>{labels}</div></div></div>'
    )


def _figure_data(figure: Figure) -> dict[str, object]:
    views = [{"data": view.data, "layout": view.layout} for view in figure.views]
    return {"views": views, "start": figure.start}


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
