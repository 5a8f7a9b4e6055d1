"""Which decoder layers get experts."""

from __future__ import annotations

import re

from moekit.core.errors import UserError

CHOICES = 'all, every-second, first-half, second-half, last:N, or a list as "0 2 5-7"'


def chosen_layers(text: str, num_layers: int) -> tuple[int, ...]:
    """The layers that `text` names, in order; every-second begins with the first.

    Raises `UserError` for another text, and for layers that are not there.
    """
    half = num_layers // 2
    named = {
        "all": range(num_layers),
        "every-second": range(0, num_layers, 2),
        "first-half": range(half),
        "second-half": range(half, num_layers),
    }
    if text in named:
        return tuple(named[text])
    if match := re.fullmatch(r"last:(\d+)", text):
        found = list(range(max(0, num_layers - int(match[1])), num_layers))
    else:
        found = []
        for part in text.split():
            match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
            if match is None:
                raise UserError(f"layers {text!r} is none of {CHOICES}.")
            found += range(int(match[1]), int(match[2] or match[1]) + 1)
    if not found or max(found) >= num_layers:
        raise UserError(f"layers {text!r}: the model has layers 0 to {num_layers - 1}.")
    return tuple(sorted(set(found)))
