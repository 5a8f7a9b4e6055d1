"""Routers and banks by their registered names, with options checked against what they declare."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from moekit.core.errors import UserError
from moekit.core.method_text import check_options
from moekit.core.registry import Method, registry


def build_router(name: str, width: int, num_experts: int, top_k: int, **options: Any) -> nn.Module:
    """The router `name` for hidden states of `width`; UserError for a wrong name or option."""
    if not 1 <= top_k <= num_experts:
        raise UserError(
            f"top_k {top_k} is not between 1 and the {num_experts} experts of router {name!r}"
        )
    method = registry.find(name, kind="router")
    return checked(method, options)(width, num_experts, top_k, **options)


def build_bank(name: str, width: int, count: int, **options: Any) -> nn.Module:
    """The bank of `count` experts of type `name`; UserError for a wrong name, count or option."""
    if count < 1:
        raise UserError(f"count {count} of experts {name!r} is below 1")
    expert_width = options.get("expert_width")
    for what, value in (("width", width), ("expert_width", expert_width)):
        if isinstance(value, int) and (value < 8 or value % 8):
            # Rows of grouped products must start at multiples of 16 bytes.
            raise UserError(f"{what} {value} of experts {name!r} is not a multiple of 8")
    method = registry.find(name, kind="expert")
    return checked(method, options)(width, count, **options)


def checked(method: Method, options: Mapping[str, Any]) -> Callable[..., Any]:
    """The code of `method`, once `options` are known to be its own and of the right type."""
    check_options(method, options, f"{method.kind} {method.name!r}")
    return method.load()
