"""A method and its options in one text, as command lines and recipes name them."""

from __future__ import annotations

import difflib
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
    """Raise UserError for an option that a method does not have, a value of another type, and an
    option that it needs and is not given.

    `where` names the place in the error, as "--method reap".
    """
    known = {option.name: option for option in method.options}
    for key, value in options.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = (
                f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known) or 'none'}"
            )
            raise UserError(f"{where} has no option {key!r}; {hint}")
        allowed = known[key].type.split(" | ")
        wanted = [part for part in allowed if part != "None"]
        if value is None and wanted != allowed:
            continue
        kinds: list[Any] = [PLAIN_TYPES.get(part, object) for part in wanted]
        right = any(isinstance(value, kind) for kind in kinds)
        if not right or (isinstance(value, bool) and not {"bool", "Any"} & {*wanted}):
            raise UserError(f"{where}: {key} is {' or '.join(wanted)}, not {value!r}")
    missing = [name for name, option in known.items() if option.required and name not in options]
    if missing:
        raise UserError(f"{where} needs option {', '.join(missing)}")
