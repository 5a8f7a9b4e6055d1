"""Moments of the inputs of every expert's matrices, for GPTQ-like, AWQ-like and Wanda-like methods.

Shapes: E experts, n tokens of one expert, D width, F expert width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moekit.core.errors import UserError
from moekit.core.layer import MoELayer
from moekit.core.stats_table import STATISTICS
from moekit.profile.collector import ProfiledCall, Sums
from moekit.profile.experts_run import ExpertRows, everyone, runs_choices


class InputMoments:
    """Collects sums over an expert's inputs x [D] and down inputs m [F].

    With `full` the matrices of x x^T and m m^T (float32), else squares, absolute values, maxima and
    gate-weighted squares by channel. With `all_tokens` every token goes through every expert; the
    model's own output keeps coming from the routed ones.
    """

    def __init__(self, full: bool = False, all_tokens: bool = False):
        self.full = full
        self.all_tokens = all_tokens

    @property
    def settings(self) -> dict[str, Any]:
        """What two parts must share to be added."""
        return {"moments_over": "all" if self.all_tokens else "routed"}

    def bytes(self, layer: MoELayer) -> int:
        """Bytes of the statistics of one layer."""
        names = ["input_second", "middle_second"] if self.full else ["input_sq", "middle_sq"] * 4
        sizes = _sizes(layer)
        total = 0
        for name in names:
            elements = 1
            for axis in STATISTICS[name].axes:
                elements *= sizes[axis]
            total += elements * STATISTICS[name].dtype.itemsize
        return total

    def begin(self, call: ProfiledCall) -> None:
        if runs_choices(call.layer):
            raise UserError(
                f"input moments are not available for {type(call.layer).__name__}: its experts "
                "do not show the input of their down projection."
            )

    def rows(self, call: ProfiledCall, rows: ExpertRows, sums: Sums) -> None:
        if not self.all_tokens:
            self._add(call, rows, sums)

    def end(self, call: ProfiledCall, update: Tensor, sums: Sums) -> None:
        for name in self._names():
            # Also where no expert ran, so that parts of a text hold the same statistics.
            self._slot(call, name, sums)
        if self.all_tokens:
            for rows in everyone(call.layer, call.seam.hidden):
                self._add(call, rows, sums)

    def _names(self) -> list[str]:
        if self.full:
            return ["moment_tokens", "input_second", "middle_second"]
        names = ["moment_tokens"]
        for role in ("input", "middle"):
            names += [f"{role}_sq", f"{role}_abs", f"{role}_peak"]
            names += [] if self.all_tokens else [f"gated_{role}_sq"]
        return names

    def _slot(self, call: ProfiledCall, name: str, sums: Sums) -> Tensor:
        sizes = _sizes(call.layer)
        shape = [sizes[axis] for axis in STATISTICS[name].axes]
        return sums.slot(call.position, name, shape, call.seam.hidden.device)

    def _add(self, call: ProfiledCall, rows: ExpertRows, sums: Sums) -> None:
        assert rows.middle is not None
        hidden, middle, gates = rows.hidden, rows.middle, rows.weights
        if call.kept is not None:
            kept = call.kept[rows.tokens]
            hidden, middle, gates = hidden[kept], middle[kept], gates[kept]
        if not len(hidden):
            return
        self._slot(call, "moment_tokens", sums)[rows.expert] += len(hidden)
        for role, values in (("input", hidden.float()), ("middle", middle.float())):
            if self.full:
                self._slot(call, f"{role}_second", sums)[rows.expert].addmm_(values.T, values)
                continue
            absolute = values.abs()
            squares = values.double().square()
            self._slot(call, f"{role}_sq", sums)[rows.expert] += squares.sum(0)
            self._slot(call, f"{role}_abs", sums)[rows.expert] += absolute.double().sum(0)
            peak = self._slot(call, f"{role}_peak", sums)[rows.expert]
            torch.maximum(peak, absolute.amax(0), out=peak)
            if not self.all_tokens:
                gated = squares * gates.double().square().unsqueeze(-1)
                self._slot(call, f"gated_{role}_sq", sums)[rows.expert] += gated.sum(0)


def _sizes(layer: MoELayer) -> dict[str, int]:
    shape = tuple(layer.experts.down_proj.shape)
    transposed = getattr(layer.experts, "is_transposed", False)
    width, inner = (shape[2], shape[1]) if transposed else (shape[1], shape[2])
    return {"E": layer.num_experts, "D": width, "F": inner}
