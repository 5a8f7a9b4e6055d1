"""A method and its options in one text, as command lines and recipes name them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moekit.core.errors import UserError

if TYPE_CHECKING:
    from moekit.core.registry import Method

PLAIN_TYPES = {"int": int, "float": (int, float), "bool": bool, "str": str}


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


def check_options(method: Method, options: Mapping[str, Any], where: str) -> None:
    """Raise UserError for an option that a method does not have, or a value of another type.

    `where` names the place in the error, as "--method reap".
    """
    known = {option.name: option for option in method.options}
    for key, value in options.items():
        if key not in known:
            there = ", ".join(known) or "none"
            raise UserError(f"{where} has no option {key!r}; there are {there}")
        wanted = [part for part in known[key].type.split(" | ") if part != "None"]
        kinds: list[Any] = [PLAIN_TYPES.get(part, object) for part in wanted]
        right = any(isinstance(value, kind) for kind in kinds)
        if not right or (isinstance(value, bool) and "bool" not in wanted):
            raise UserError(f"{where}: {key} is {' or '.join(wanted)}, not {value!r}")
