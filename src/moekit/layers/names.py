"""What to say of a name that does not exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from moekit.core.errors import UserError


def one_of(what: str, value: object, known: Iterable[str]) -> None:
    """UserError with the nearest match unless `value` is among `known`."""
    names = list(known)
    if value not in names:
        near = difflib.get_close_matches(str(value), names, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(names)}"
        raise UserError(f"{what} {value!r} is unknown: {hint}")
