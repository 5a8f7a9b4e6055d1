"""Passages as HTML: a span for every token, which the page's script tints by expert."""

from __future__ import annotations

import html

from moekit.report.page_json import script_json
from moekit.report.token_text import TokenText

# What stands for characters that would not be seen, or would change the page around them.
BREAK, TAB, HIDDEN = "⏎", "⇥", "·"


def text_html(text: TokenText) -> str:
    """The passages with a menu of layers; ids and weights lie beside them as data."""
    options = "".join(
        f"<option value={place}>layer {layer}</option>" for place, layer in enumerate(text.layers)
    )
    passages = "".join(
        f"<figure class=passage><figcaption>{html.escape(p.domain or 'text')}</figcaption>"
        + "<p dir=auto>"
        + "".join(f"<span>{token_html(token)}</span>" for token in p.tokens)
        + "</p></figure>"
        for p in text.passages
    )
    data = [[p.experts.tolist(), p.weights.tolist()] for p in text.passages]
    return (
        "<div class=tokens><div class=bar><label>layer "
        f"<select>{options}</select></label>"
        "<output aria-live=polite>Point at a token.</output></div>"
        f"{passages}<script type=application/json>{script_json(data)}</script></div>"
    )


def token_html(token: str) -> str:
    """A token as visible, escaped text; line breaks stay line breaks."""
    if not token:
        return HIDDEN
    shown = []
    for character in token:
        if character == "\n":
            shown.append(f"{BREAK}\n")
        elif character == "\t":
            shown.append(TAB)
        elif character == " " or character.isprintable():
            shown.append(html.escape(character))
        else:
            shown.append(HIDDEN)
    return "".join(shown)
