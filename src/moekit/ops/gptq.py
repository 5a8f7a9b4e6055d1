"""GPTQ: rounding a matrix column by column, each error made good by the columns still to come.

Shapes: O output rows, I input columns, G columns a group, N groups a row. A Hessian [I, I] is the
second moment X^T X of the inputs, of any scale. Leading axes are matrices apart (QMoE's batches).

GPTQ, arXiv 2210.17323; batches, and rounding to nearest where a factorisation fails: QMoE, arXiv
2310.16795.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from moekit.core.errors import UserError
from moekit.ops.codecs import Codec, Encoded
from moekit.ops.codecs.grid import Grid, GridCodec
from moekit.ops.codecs.range_search import searched_fit

DAMP = 0.01
BLOCK = 128
Fit = Callable[[Tensor], Grid]


def gptq(
    weight: Tensor,
    hessian: Tensor,
    codec: GridCodec,
    *,
    damp: float = DAMP,
    act_order: bool = True,
    block: int = BLOCK,
    reach: float = 0.0,
) -> tuple[Tensor, Grid]:
    """Codes [..., O, I] and grids [..., O, N] of `weight` [..., O, I] under `hessian` [..., I, I].

    `damp` is the share of the mean diagonal that is added to it. With `act_order` the columns are
    taken by falling diagonal, on the grids of the original weights; without, in their order, and a
    grid is fitted when its group is reached, to weights as changed by then. `block` columns are
    changed at once. `reach` searches the range of each grid (`searched_fit`).

    Columns whose input is always zero become zero. A matrix whose Hessian cannot be factorised is
    rounded to nearest. Raises `UserError` for shapes that do not fit the codec.
    """
    weight, hessian = _without_dead(weight.float(), hessian)
    width = weight.shape[-1]
    # A codec may have one grid a row.
    group = codec.group_size or width
    if width % group:
        raise UserError(f"{width} columns do not split into groups of {group}.")
    fit: Fit = partial(searched_fit, codec, reach=reach) if reach else codec.fit
    grids: Grid = {}
    order = None
    if act_order:
        grids = fit(weight.unflatten(-1, (-1, group)))
        order = hessian.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True, stable=True)
        hessian = _permuted(_permuted(hessian, order).mT, order).mT
        weight = _permuted(weight, order)
    factor = inverse_factor(hessian, damp).float()
    # Beside the codes, grids by column: what a column is rounded to in whatever order it comes.
    by_column = {
        name: _maybe_permuted(value.repeat_interleave(group, -1), order)
        for name, value in grids.items()
    }
    codes = torch.zeros_like(weight)
    if order is None:
        # A grid is fitted to weights that all earlier columns have changed.
        block = max(group, block // group * group)
    for start in range(0, width, block):
        stop = min(start + block, width)
        piece = weight[..., start:stop].clone()
        errors = torch.zeros_like(piece)
        for j in range(start, stop):
            at = j - start
            if order is None and j % group == 0:
                current = fit(piece[..., at : at + group])
                for name, value in current.items():
                    grids.setdefault(name, value.new_zeros(*weight.shape[:-1], width // group))
                    grids[name][..., j // group] = value
            grid = current if order is None else {n: v[..., j] for n, v in by_column.items()}
            column = piece[..., at]
            codes[..., j] = codec.nearest(column, grid)
            error = (column - codec.level(codes[..., j], grid)) / factor[..., j, j, None]
            piece[..., at:] -= error[..., None] * factor[..., j, None, j:stop]
            errors[..., at] = error
        weight[..., stop:] -= errors @ factor[..., start:stop, stop:]
    return _maybe_permuted(codes, None if order is None else order.argsort(-1)), grids


def gptq_naive(
    weight: Tensor, hessian: Tensor, codec: GridCodec, *, damp: float = DAMP
) -> tuple[Tensor, Grid]:
    """`gptq` of one matrix [O, I] in the order of its columns, as the method is derived.

    At each column the Hessian of those still to come is inverted anew.
    """
    weight, hessian = _without_dead(weight.float(), hessian)
    weight = weight.double()
    hessian = _damped(hessian, damp)
    group = codec.group_size or weight.shape[1]
    codes, grids = torch.zeros_like(weight), []
    for j in range(weight.shape[1]):
        if j % group == 0:
            grids.append(codec.fit(weight[:, j : j + group].float()))
        inverse = torch.linalg.inv(hessian[j:, j:])
        codes[:, j] = codec.nearest(weight[:, j].float(), grids[-1])
        error = (weight[:, j] - codec.level(codes[:, j], grids[-1])) / inverse[0, 0]
        weight[:, j:] -= error[:, None] * inverse[0]
    return codes.float(), {name: torch.stack([g[name] for g in grids], -1) for name in grids[0]}


def gptq_encode(
    weights: Tensor,
    hessians: Tensor,
    codec: Codec,
    *,
    damp: float = DAMP,
    act_order: bool = True,
    block: int = BLOCK,
    reach: float = 0.0,
) -> list[Encoded]:
    """Matrices [B, O, I] encoded by `gptq`; codecs of several planes block by block.

    Those are rounded to nearest within a block of `block` columns, whose error the later blocks
    make good as well as they can (D2MoE 2504.15299); `act_order` and `reach` do not apply to them.
    """
    if not isinstance(codec, GridCodec):
        pairs = zip(weights, hessians, strict=True)
        return [_encode_blocks(weight, hessian, codec, damp, block) for weight, hessian in pairs]
    codes, grids = gptq(
        weights, hessians, codec, damp=damp, act_order=act_order, block=block, reach=reach
    )
    groups = next(iter(grids.values())).shape[-1]
    return [
        Encoded(
            (weights.shape[1], weights.shape[2]),
            (codec.pack(own.unflatten(1, (groups, -1)), {n: v[at] for n, v in grids.items()}),),
        )
        for at, own in enumerate(codes)
    ]


def _encode_blocks(
    weight: Tensor, hessian: Tensor, codec: Codec, damp: float, block: int
) -> Encoded:
    weight, hessian = _without_dead(weight.float(), hessian)
    factor = inverse_factor(hessian, damp).float()
    pieces = []
    for start in range(0, weight.shape[1], block):
        stop = min(start + block, weight.shape[1])
        piece = weight[:, start:stop]
        pieces.append(codec.encode(piece))
        error = piece - codec.decode(pieces[-1])
        # The least squares of the later columns, given that the whole block has this error.
        solved = torch.linalg.solve_triangular(
            factor[start:stop, start:stop], error, upper=True, left=False
        )
        weight[:, stop:] -= solved @ factor[start:stop, stop:]
    # Groups are the second axis of every array.
    planes = tuple(
        {name: torch.cat([p.planes[i][name] for p in pieces], 1) for name in plane}
        for i, plane in enumerate(pieces[0].planes)
    )
    return Encoded((weight.shape[0], weight.shape[1]), planes)


def inverse_factor(hessian: Tensor, damp: float = DAMP) -> Tensor:
    """Upper triangular R [..., I, I], float64, with R^T R the inverse of the damped Hessian.

    The identity where that is not positive definite.
    """
    identity = torch.eye(hessian.shape[-1], dtype=torch.float64).expand(hessian.shape)
    damped = _damped(hessian, damp)
    lower, failed = torch.linalg.cholesky_ex(damped)
    lower = torch.where((failed > 0)[..., None, None], identity, lower)
    upper, failed_again = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return torch.where((failed + failed_again > 0)[..., None, None], identity, upper)


def proxy_loss(difference: Tensor, hessian: Tensor) -> Tensor:
    """||difference X^T||^2 over the tokens of the Hessian: what GPTQ lowers. Scalar [...]."""
    return ((difference.double() @ hessian.double()) * difference.double()).sum((-2, -1))


def _damped(hessian: Tensor, damp: float) -> Tensor:
    hessian = hessian.double()
    mean = hessian.diagonal(dim1=-2, dim2=-1).mean(-1)
    identity = torch.eye(hessian.shape[-1], dtype=torch.float64)
    return hessian + (damp * mean)[..., None, None] * identity


def _without_dead(weight: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Copies in which columns that no input reaches are zero and stand alone."""
    dead = hessian.diagonal(dim1=-2, dim2=-1) == 0
    return (
        weight.masked_fill(dead[..., None, :], 0.0),
        hessian + torch.diag_embed(dead.to(hessian.dtype)),
    )


def _permuted(values: Tensor, order: Tensor) -> Tensor:
    """Columns [..., I] in another order [..., I]."""
    return values.gather(-1, order[..., None, :].expand(values.shape))


def _maybe_permuted(values: Tensor, order: Tensor | None) -> Tensor:
    return values if order is None else _permuted(values, order)
