"""The MoE layers of a loaded model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from moekit.core import seam
from moekit.core.errors import UserError
from moekit.core.find import find_moe
from moekit.core.layer import MoELayer
from moekit.core.port import SeamCall

if TYPE_CHECKING:
    from moekit.core.trace import RoutingTrace


class MoEView:
    """The MoE layers of `model` in execution order, found by structure.

    Raises UserError for a model without MoE layers. The view holds no state of its own and changes
    nothing until one of its context managers is entered.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        sites = find_moe(model)
        if not sites:
            raise UserError(f"{type(model).__name__} has no MoE layers.")
        self.layers = [
            (site.adapter or MoELayer)(site, position) for position, site in enumerate(sites)
        ]

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, position: int) -> MoELayer:
        return self.layers[position]

    def __iter__(self) -> Iterator[MoELayer]:
        return iter(self.layers)

    def trace(
        self, out: str | Path | None = None, *, logits: bool = False, domain: str = ""
    ) -> AbstractContextManager[RoutingTrace]:
        """Record the routing of every forward inside the context as a `RoutingTrace`.

        The trace is filled when the context ends: in memory, or streamed to the directory `out`.
        """
        from moekit.core.trace_writer import tracing

        return tracing(self, out, logits=logits, domain=domain)

    def observe(
        self,
        fn: Callable[[SeamCall], None],
        *,
        logits: bool = False,
        layers: Iterable[int] | None = None,
    ) -> AbstractContextManager[None]:
        """Call `fn` at every call of the experts; see `seam.observe`."""
        return seam.observe(self, fn, logits=logits, layers=layers)

    def transform_routing(
        self,
        fn: Callable[..., Any],
        on: Literal["logits", "selection"] = "logits",
        layers: Iterable[int] | None = None,
    ) -> AbstractContextManager[None]:
        """Change the routing: `fn(layer, logits, hidden)` or `fn(layer, routing, hidden)`.

        On "logits" the family's own rule runs on what `fn` returns; on "selection" the returned ids
        and weights are used as they are. See `seam.transform_logits`, `seam.transform_routing`.
        """
        if on == "logits":
            return seam.transform_logits(self, fn, layers=layers)
        if on == "selection":
            return seam.transform_routing(self, fn, layers=layers)
        raise UserError(f"transform_routing: on is 'logits' or 'selection', not {on!r}.")

    def ban_experts(
        self, experts: dict[int, Iterable[int]] | Iterable[int]
    ) -> AbstractContextManager[None]:
        """Keep experts from ever being chosen; see `seam.ban_experts`."""
        return seam.ban_experts(self, experts)

    def use_backend(
        self, backend: str | Callable[..., Any], layers: Iterable[int] | None = None
    ) -> AbstractContextManager[None]:
        """Compute the experts by another function or named backend; see `seam.replace_backend`."""
        return seam.replace_backend(self, backend, layers=layers)
