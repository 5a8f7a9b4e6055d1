"""What collectors of statistics share: the call they see and the sums they add to.

Shapes: T tokens, K choices, C choices of a layer, G domains, H residual width, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from moekit.core.layer import MoELayer
from moekit.core.port import SeamCall
from moekit.core.stats_table import STATISTICS
from moekit.profile.experts_run import ExpertRows


@dataclass
class ProfiledCall:
    """One call at the seam with what statistics need beside it.

    `domain` [T] numbers the domain of every token, `num_domains` at padding. `scale` multiplies the
    routed output on its way into the residual stream, `residual` [T, H] where it is known.
    """

    seam: SeamCall
    domain: Tensor
    num_domains: int
    scale: float
    residual: Tensor | None

    @property
    def layer(self) -> MoELayer:
        return self.seam.layer

    @property
    def position(self) -> int:
        return self.seam.layer.position

    @cached_property
    def kept(self) -> Tensor | None:
        """[T], False at padding; None where nothing is padded."""
        mask = self.seam.mask
        return None if mask is None or bool(mask.all()) else mask.bool()

    def unpadded(self, tensor: Tensor) -> Tensor:
        """The rows of a tensor [T, ...] that are no padding."""
        return tensor if self.kept is None else tensor[self.kept]


class Sums:
    """Running statistics by (position, name), each added or maximised as its table row says."""

    def __init__(self) -> None:
        self.held: dict[tuple[int, str], Tensor] = {}

    def slot(self, position: int, name: str, shape: Sequence[int], device: Any) -> Tensor:
        """The running statistic itself, to be added to in place; zeros at first."""
        key = position, name
        if key not in self.held:
            self.held[key] = torch.zeros(*shape, dtype=STATISTICS[name].dtype, device=device)
        return self.held[key]

    def add(self, position: int, name: str, value: Tensor) -> None:
        """Combine `value` with what is there; a domain axis that has grown is filled with zeros."""
        statistic = STATISTICS[name]
        value = value.to(statistic.dtype)
        key = position, name
        held = self.held.get(key)
        if held is None:
            self.held[key] = value.clone()
            return
        if statistic.axes.startswith("G") and len(held) < len(value):
            self.held[key] = held = torch.cat([held, held.new_zeros(value[len(held) :].shape)])
        if statistic.combine == "concat":
            self.held[key] = torch.cat([held, value])
        elif statistic.combine == "sum":
            held += value
        else:
            torch.maximum(held, value, out=held)


class Collector(Protocol):
    """Fills some statistics: `rows` for every expert that ran, then `end` once for the call."""

    def begin(self, call: ProfiledCall) -> None: ...

    def rows(self, call: ProfiledCall, rows: ExpertRows, sums: Sums) -> None: ...

    def end(self, call: ProfiledCall, update: Tensor, sums: Sums) -> None: ...
