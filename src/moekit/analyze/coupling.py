"""How well routers and experts are coupled: which expert each router row excites most.

Shapes: E experts, F expert width, D width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moekit.analyze.information import p_value
from moekit.analyze.result import Result
from moekit.core.errors import UserError
from moekit.core.layer import MoELayer
from moekit.core.registry import register
from moekit.core.seeds import derive_seed
from moekit.core.view import MoEView

Array = NDArray[np.float64]


@register(
    "measure",
    "coupling",
    title="Expert-router coupling: does a router row excite its own expert most?",
    paper="ERC loss 2512.23447",
    needs=("weights",),
    limits="Without the paper's noise on the router rows. The loss grows with the weights' scale.",
    options={
        "alpha": "share of its own response that others must stay below in the loss",
        "permutations": "random pairings of routers and experts to compare with",
        "seed": "seed of the permutations",
    },
)
def coupling(
    view: MoEView, *, alpha: float = 1.0, permutations: int = 200, seed: int = 0
) -> Result:
    """Compute the matrix of responses M[i, j] of expert j's gate projection to router row i.

    `own rows` is the share of router rows that excite their own expert most, `own columns` that of
    experts whose own row excites them most (chance: 1/E). `contrast` is the mean log of an own
    response over the other responses in its row and column; `p` says how often random pairings have
    as much. `spacing` is half the distance to the nearest other row over the row's length. Raises
    UserError where no layer has a router matrix of the experts' width.
    """
    rows, matrices = [], {}
    left_out = []
    for layer in view:
        matrix = response(layer)
        if matrix is None:
            left_out.append(layer.index)
            continue
        found, p = _contrast(matrix, layer, permutations, seed)
        own = np.arange(len(matrix))
        rows.append(
            (
                layer.index,
                float((matrix.argmax(1) == own).mean()),
                float((matrix.argmax(0) == own).mean()),
                1 / len(matrix),
                found,
                p,
                coupling_loss(matrix, alpha),
                _spacing(layer),
            )
        )
        matrices[str(layer.index)] = matrix
    if not rows:
        raise UserError("no layer has a router matrix as wide as its experts' input")
    summary: dict[str, Any] = {
        "own_rows": float(np.mean([row[1] for row in rows])),
        "own_columns": float(np.mean([row[2] for row in rows])),
        "contrast": float(np.mean([row[4] for row in rows])),
        "coupled_layers": sum(row[5] <= 0.05 for row in rows),
        "layers": len(rows),
        "loss": float(np.mean([row[6] for row in rows])),
    }
    notes = [f"layers without a router matrix of the experts' width: {left_out}"] * bool(left_out)
    columns = ("layer", "own rows", "own columns", "chance", "contrast", "p", "loss", "spacing")
    return Result(columns, rows, summary, {"matrices": matrices}, notes)


def response(layer: MoELayer) -> Array | None:
    """M [E, E]: the norm of expert j's gate projection (up where it has none) of router row i.

    None where there is no router matrix of the experts' width.
    """
    weight = layer.router_weight
    views = [layer.expert_views(e) for e in range(layer.num_experts)]
    projections = [v.gate if v.gate is not None else v.up for v in views]
    if weight is None or any(p is None or p.shape[1] != weight.shape[1] for p in projections):
        return None
    rows = weight.detach()[: layer.num_experts].float()
    columns = [(rows @ p.float().T).norm(dim=1) for p in projections if p is not None]
    return torch.stack(columns, dim=1).double().numpy(force=True)


def coupling_loss(matrix: Array, alpha: float) -> float:
    """The paper's loss: the mean over all pairs of what others exceed alpha times the own by."""
    own = alpha * matrix.diagonal()[:, None]
    others = ~np.eye(len(matrix), dtype=bool)
    excess = np.maximum(matrix - own, 0) + np.maximum(matrix.T - own, 0)
    return float(excess[others].sum() / len(matrix) ** 2)


def _contrast(matrix: Array, layer: MoELayer, permutations: int, seed: int) -> tuple[float, float]:
    """Mean log response of pairs, rows and columns taken off, and its p under random pairings."""
    logs = np.log(np.maximum(matrix, 1e-30))
    logs = logs - logs.mean(0) - logs.mean(1)[:, None] + logs.mean()
    random = np.random.default_rng(derive_seed(seed, "coupling", layer.index))
    rows = np.arange(len(matrix))
    null = np.array([logs[rows, random.permutation(rows)].mean() for _ in range(permutations)])
    found = float(logs.diagonal().mean())
    return found, float(p_value(found, null))


def _spacing(layer: MoELayer) -> float:
    """The mean over router rows of the paper's epsilon."""
    assert layer.router_weight is not None
    rows = layer.router_weight.detach()[: layer.num_experts].float()
    distance = torch.cdist(rows, rows).fill_diagonal_(float("inf"))
    return float((distance.min(1).values / (2 * rows.norm(dim=1).clamp_min(1e-12))).mean())
