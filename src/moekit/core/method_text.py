"""A method and its options in one text, as command lines and recipes name them."""

from __future__ import annotations

import json
from typing import Any

from moekit.core.errors import UserError


def parse_method(text: str) -> tuple[str, dict[str, Any]]:
    """`NAME` or `NAME:OPTION=VALUE,...` as a name and options; values are JSON, or else text.

    Raises UserError for another form.
    """
    name, colon, rest = text.partition(":")
    options: dict[str, Any] = {}
    for part in rest.split(",") if colon else ():
        option, equals, value = (piece.strip() for piece in part.partition("="))
        if not (name and option and equals):
            raise UserError(f"{text!r} is not NAME or NAME:OPTION=VALUE,OPTION=VALUE")
        try:
            options[option] = json.loads(value)
        except ValueError:
            options[option] = value
    return name.strip(), options
