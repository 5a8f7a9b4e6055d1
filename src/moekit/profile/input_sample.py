"""A sample of the experts' inputs, for methods that need the inputs themselves.

Shapes: S sampled tokens, D width, K choices.
"""

from __future__ import annotations

from typing import Any

import torch

from moekit.core.layer import MoELayer
from moekit.core.stats_table import STATISTICS
from moekit.profile.collector import ProfiledCall, Sums
from moekit.profile.experts_run import ExpertRows


class InputSample:
    """Keeps every `stride`-th token that passes a layer, with what the router said of it."""

    def __init__(self, capacity: int, num_tokens: int):
        self.capacity = min(capacity, num_tokens)
        self._stride = max(1, -(-num_tokens // capacity))
        self._seen: dict[int, int] = {}

    @property
    def settings(self) -> dict[str, Any]:
        """Samples of any size combine."""
        return {}

    def bytes(self, layer: MoELayer) -> int:
        """Bytes of the sample of one layer, at most."""
        return self.capacity * (4 * layer.router_width + 12 * layer.top_k)

    def begin(self, call: ProfiledCall) -> None:
        pass

    def rows(self, call: ProfiledCall, rows: ExpertRows, sums: Sums) -> None:
        pass

    def end(self, call: ProfiledCall, update: torch.Tensor, sums: Sums) -> None:
        hidden = call.unpadded(call.seam.hidden)
        seen = self._seen.get(call.position, 0)
        self._seen[call.position] = seen + len(hidden)
        kept = torch.arange(-seen % self._stride, len(hidden), self._stride, device=hidden.device)
        values = {
            "sample_hidden": hidden,
            "sample_ids": call.unpadded(call.seam.ids),
            "sample_weights": call.unpadded(call.seam.weights),
        }
        for name, value in values.items():
            sums.add(call.position, name, value[kept].to(STATISTICS[name].dtype))
