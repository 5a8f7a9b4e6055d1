"""Zeros within the experts: Wanda's masks, with every token counted by its gate (MoE-Pruner).

A weight scores its size times the norm of its input over the expert's tokens, and the lowest of
every row become zero: a share of them, or so many of each few neighbours (2:4). Matrices keep their
shape; what runs sparse ones faster is another program.

Shapes: O outputs, I inputs of a matrix, D width, F expert width.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from moekit.core.errors import UserError
from moekit.core.expert_weights import ExpertWeights
from moekit.core.plan import Action, ExpertPlan, Fingerprint, Fit
from moekit.core.registry import Option, register, register_preset
from moekit.core.rewrite import Read, Rewrite
from moekit.core.spec import MoESpec
from moekit.core.stats import ExpertStats

KIND = "sparsifier"
_PATTERN = re.compile(r"([0-9]+):([0-9]+)")


def masked(
    weight: Tensor, squares: Tensor, sparsity: float = 0.5, pattern: str | None = None
) -> Tensor:
    """A matrix [O, I] with the lowest |weight| * sqrt(squares) [I] of every row set to zero.

    `sparsity` is the share of each row, rounded to whole weights; with `pattern` "N:M" N of every
    M neighbours stay instead. Of equal scores the later go. Raises UserError for another pattern,
    a share outside of 0 to 1, and rows that do not divide by M.
    """
    columns = weight.shape[1]
    # Without tokens nothing is known of the inputs, and the size alone decides.
    known = bool((squares > 0).any())
    score = weight.float().abs() * (squares.float().sqrt() if known else 1)
    if pattern is None:
        stay, width = columns - round(_share(sparsity) * columns), columns
    else:
        stay, width = _parsed(pattern)
        if columns % width:
            raise UserError(
                f"rows of {columns} weights do not divide into the {width} of {pattern}"
            )
    groups = score.view(len(weight), -1, width)
    order = groups.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return weight * (order < stay).view_as(weight)


def _share(sparsity: float) -> float:
    if not 0 <= sparsity < 1:
        raise UserError(f"sparsity {sparsity} is the share of weights that become zero, below 1")
    return sparsity


def _parsed(pattern: str) -> tuple[int, int]:
    match = _PATTERN.fullmatch(pattern)
    if match is None or not 0 < int(match[1]) <= int(match[2]):
        raise UserError(f"pattern {pattern!r} is not N:M, N weights of every M that stay, as 2:4")
    return int(match[1]), int(match[2])


@register(
    KIND,
    "moe-pruner",
    title="Zero the weights whose size times gate-weighted input is least, in every row",
    paper="MoE-Pruner 2410.12013",
    needs=("weights", "data"),
    limits="The matrices stay dense in every format; needs stats of the set diagonal. The paper's "
    "distillation afterwards is not part of it.",
    options={
        "sparsity": "share of every row that becomes zero",
        "pattern": "N:M, N of every M neighbours stay, in place of a share",
    },
)
class MaskedExperts(Rewrite):
    """The rewrite that sets the least weights of every expert to zero, protected experts apart.

    With `gated` (MoE-Pruner) inputs count by their token's gate, else alike (Wanda, 2306.11695).
    Raises UserError for stats without the inputs' squares, and for what `masked` refuses.
    """

    def __init__(
        self,
        plan: ExpertPlan,
        stats: ExpertStats,
        *,
        model: Path | None = None,
        sparsity: float = 0.5,
        pattern: str | None = None,
        gated: bool = True,
    ) -> None:
        self._plan = plan
        self._sparsity, self._pattern = _share(sparsity), pattern
        if pattern is not None:
            _parsed(pattern)
        prefix = "gated_" if gated else ""
        digest = hashlib.sha256()
        self._squares: dict[int, tuple[Tensor, Tensor]] = {}
        for position, layer in enumerate(stats.layers):
            found = [stats.get(position, f"{prefix}{name}_sq") for name in ("input", "middle")]
            self._squares[layer.index] = found[0], found[1]
            for squares in found:
                digest.update(squares.numpy().tobytes())
        self.identity = {
            "method": "moe-pruner" if gated else "wanda",
            "sparsity": sparsity,
            "pattern": pattern,
            "stats": digest.hexdigest(),
        }

    def expert(
        self, layer: int, expert: int, members: Mapping[int, float], read: Read
    ) -> ExpertWeights:
        weights = read(expert)
        if self._plan.action(layer, expert).protect:
            return weights
        inputs, middles = (squares[expert] for squares in self._squares[layer])

        def cut(matrix: Tensor | None, squares: Tensor) -> Tensor | None:
            if matrix is None:
                return None
            return masked(matrix, squares.to(matrix.device), self._sparsity, self._pattern)

        down = cut(weights.down, middles)
        assert down is not None
        return replace(
            weights, gate=cut(weights.gate, inputs), up=cut(weights.up, inputs), down=down
        )


register_preset(
    MaskedExperts,
    "wanda",
    kind=KIND,
    title="Zero the weights whose size times input is least, in every row",
    paper="Wanda 2306.11695",
    needs=("weights", "data"),
    limits="As moe-pruner, with all of an expert's tokens counted alike.",
    settings={"gated": False},
    options=(
        Option("sparsity", "float", "share of every row that becomes zero", 0.5),
        Option("pattern", "str | None", "N:M, N of every M neighbours stay, in place of a share"),
    ),
)


def mask_plan(
    spec: MoESpec,
    method: str,
    options: Mapping[str, object],
    protect: Mapping[int, Collection[int]],
    stats: Path | None,
) -> ExpertPlan:
    """The plan whose `fit` is a mask: no expert goes, and the protected ones keep all weights."""
    layers = {
        index: {e: Action(protect=True) for e in experts} for index, experts in protect.items()
    }
    fit = Fit(method, str(stats) if stats else None, dict(options))
    return ExpertPlan(layers, Fingerprint.of(spec), f"prune: {method}", fit=fit)
