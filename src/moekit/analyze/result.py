"""What a measure returns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Result:
    """A table for people (`columns`, `rows`) and everything else for programs.

    `summary` holds single numbers about the whole trace, `detail` arrays too large for a table,
    `notes` sentences that a reader of the numbers must know.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    summary: dict[str, Any] = field(default_factory=dict)
    detail: dict[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def column(self, name: str) -> list[Any]:
        """One column of the table."""
        place = list(self.columns).index(name)
        return [row[place] for row in self.rows]

    def to_dict(self) -> dict[str, Any]:
        """The result in plain types for JSON; not-a-number becomes None."""
        return {
            "summary": _plain(self.summary),
            "table": [_plain(dict(zip(self.columns, row, strict=True))) for row in self.rows],
            "detail": _plain(self.detail),
            "notes": list(self.notes),
        }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
