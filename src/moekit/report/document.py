"""One HTML file that holds its style, its script, its figures and plotly itself."""

from __future__ import annotations

import html
from collections.abc import Sequence
from importlib.resources import files

from moekit.core.errors import UserError
from moekit.report.colours import DARK, LIGHT, css_variables
from moekit.report.figure import Figure, Key
from moekit.report.page_json import script_json

# Nothing outside of the file may be loaded, whatever is in it.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; font-src data:; base-uri 'none'; form-action 'none'"
)


NO_SCRIPT = "<noscript><p class=note>The figures need JavaScript.</p></noscript>"


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


def document(title: str, body: str, figures: Sequence[Figure], bundle: str, shape: str) -> str:
    """The whole file: `body` (HTML whose figures came through `figure_html`) with what it needs.

    `title` is HTML, `bundle` plotly's JavaScript, `shape` a class of the body: one or two columns.
    """
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
<title>{title}</title>
<style>{scheme}{css}</style></head>
<body class="{shape}">
{body}
<script type="application/json" id="data">{script_json(data)}</script>
<script>{bundle}</script>
<script>{script}</script>
</body></html>
"""


def figure_html(figure: Figure, figures: list[Figure]) -> str:
    """The HTML of one figure, which is added to `figures`."""
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
