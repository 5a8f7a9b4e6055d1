"""A parameter's value for one tensor: numbers, gradients over depth, filters by name, precedence.

As in mergekit: what a source says comes before its slice, that before the recipe, that before the
method's default. A list of numbers is a gradient from the first layer of a slice to its last; a
list of {filter, value} takes the first entry whose filter is part of the name, or that has none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moekit.core.errors import UserError

Level = Mapping[str, Any]


def resolve(
    key: str, levels: Sequence[Level], tensor: str, depth: float, default: Any = None
) -> Any:
    """The value of `key` for a tensor at `depth` (0 first layer of its slice, 1 last).

    `levels` in order of precedence. `default` where none says; `UserError` for a value of a form
    that is not known.
    """
    for level in levels:
        if key in level:
            value = _evaluate(key, level[key], tensor, depth)
            if value is not None:
                return value
    return default


def depth_of(layer: int | None, layers: int) -> float:
    """Where a layer lies in its slice of `layers`; tensors outside of layers are at the start."""
    if layer is None:
        return 0.0
    return layer / (layers - 1) if layers > 1 else 1.0


def _evaluate(key: str, value: Any, tensor: str, depth: float) -> Any:
    if isinstance(value, list):
        if not value:
            raise UserError(f"parameter {key} is an empty list.")
        if all(isinstance(one, int | float) and not isinstance(one, bool) for one in value):
            return _gradient(value, depth)
        return _filtered(key, value, tensor, depth)
    if isinstance(value, Mapping):
        return _filtered(key, [value], tensor, depth)
    if isinstance(value, int | float | str | bool):
        return value
    raise UserError(f"parameter {key} is {value!r}: give a number, a gradient or filters.")


def _filtered(key: str, entries: Sequence[Any], tensor: str, depth: float) -> Any:
    for entry in entries:
        if (
            not isinstance(entry, Mapping)
            or "value" not in entry
            or set(entry) - {"value", "filter"}
        ):
            raise UserError(f"parameter {key}: {entry!r} is not {{filter, value}}.")
        pattern = entry.get("filter")
        if pattern is None or pattern == "*" or str(pattern) in tensor:
            return _evaluate(key, entry["value"], tensor, depth)
    return None


def _gradient(values: Sequence[float], depth: float) -> float:
    place = depth * (len(values) - 1)
    low = int(place)
    share = place - low
    return (1 - share) * values[low] + share * values[min(low + 1, len(values) - 1)]
