"""Least squares over matrices that read the same or similar inputs, by second moments.

Shapes: O rows (outputs), D columns (inputs), N matrices. A moment [D, D] is a sum or mean of x x^T.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Of the mean diagonal of the moment: how strongly the centre holds.
RIDGE = 1e-2


def regression_mean(
    matrices: Sequence[Tensor],
    moments: Sequence[Tensor],
    shares: Sequence[float],
    centre: Tensor,
    ridge: float = RIDGE,
) -> Tensor:
    """The matrix [O, D] whose outputs are nearest to each of N matrices' on its own inputs.

    Minimises the sum over them of share * |X (W - W_i)^T|^2 by X^T X = their moments, plus a ridge
    * |W - centre|^2 (RegMean 2212.09849); equal moments give the average where that is the centre.
    `centre` comes back where no input was seen. float64 inside, in the dtype of the centre.
    """
    total = torch.zeros(len(moments[0]), len(moments[0]), dtype=torch.float64)
    cross = torch.zeros(centre.shape, dtype=torch.float64)
    for matrix, moment, share in zip(matrices, moments, shares, strict=True):
        total += share * moment.double()
        cross += share * (matrix.double() @ moment.double())
    return solved(total, cross, centre, ridge)


def solved(moment: Tensor, cross: Tensor, centre: Tensor, ridge: float = RIDGE) -> Tensor:
    """The matrix W [O, D] that minimises |Z W^T - Y|^2 + ridge * |W - centre|^2.

    `moment` Z^T Z and `cross` Y^T Z [O, D], float64; `ridge` is a share of the moment's mean
    diagonal. The sum of squares never exceeds that of the centre. Without inputs it is the centre.
    """
    held = ridge * float(moment.diagonal().mean())
    if held <= 0:
        return centre
    moment = moment.clone()
    moment.diagonal().add_(held)
    found = torch.linalg.solve(moment, (cross + held * centre.double()).T).T
    return found.to(centre.dtype)
