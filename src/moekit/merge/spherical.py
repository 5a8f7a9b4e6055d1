"""Averages that follow the sphere: SLERP, NuSLERP, Multi-SLERP, Karcher mean, model stock.

Each takes whole tensors of one shape and works on them as flat vectors unless it says otherwise.
The formulas and their limits are those of mergekit; where it divides by zero, these do not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moekit.core.errors import UserError

# Above this cosine two directions count as one and are interpolated along the line.
COLLINEAR = 0.9995
SMALLEST_NORM = 1e-8


def slerp(first: Tensor, second: Tensor, t: float) -> Tensor:
    """From `first` (t = 0) to `second` (t = 1) along the great circle; norms are not kept."""
    a, b = first.float(), second.float()
    norms = [x.norm() for x in (a, b)]
    units = [
        x / torch.where(norm > SMALLEST_NORM, norm, torch.ones_like(norm))
        for x, norm in zip((a, b), norms, strict=True)
    ]
    cosine = (units[0] * units[1]).sum().clamp(-1, 1)
    if float(cosine.abs()) > COLLINEAR:
        return ((1 - t) * a + t * b).to(first.dtype)
    angle = torch.acos(cosine)
    shares = torch.sin((1 - t) * angle) / angle.sin(), torch.sin(t * angle) / angle.sin()
    return (shares[0] * a + shares[1] * b).to(first.dtype)


def nuslerp(
    first: Tensor,
    second: Tensor,
    weights: Sequence[float],
    base: Tensor | None = None,
    *,
    row_wise: bool = False,
    flatten: bool = True,
) -> Tensor:
    """SLERP by weights, of the task vectors where there is a base; by row or column if asked."""
    total = sum(weights)
    t = 0.5 if abs(total) < 1e-6 else weights[1] / total
    if base is not None:
        first, second = first - base, second - base
    a, b = first, second
    if flatten:
        a, b, axis = a.reshape(-1), b.reshape(-1), 0
    else:
        axis = 0 if row_wise else -1
    unit_a, unit_b = (x / x.norm(dim=axis, keepdim=True).clamp(min=1e-7) for x in (a, b))
    cosine = (unit_a * unit_b).sum(dim=axis, keepdim=True).clamp(-1, 1)
    # Along the line, in opposite directions too, where the angle has no usable sine.
    flat = cosine.square() == 1
    angle = torch.acos(torch.where(flat, torch.zeros_like(cosine), cosine))
    sine = torch.sin(angle)
    along = torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b
    line = (1 - t) * a + t * b
    mixed = torch.where(flat, line, along / sine)
    mixed = mixed.reshape(first.shape)
    return mixed if base is None else base + mixed


def multislerp(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    base: Tensor | None = None,
    *,
    normalize: bool = True,
    eps: float = 1e-8,
) -> Tensor:
    """Weighted mean in the tangent space at the mean direction, for any number of models."""
    stacked = torch.stack(list(tensors))
    if base is not None:
        stacked = stacked - base
    factors = torch.tensor(weights, dtype=stacked.dtype)
    if normalize:
        factors = factors / factors.sum()
    flat = stacked.flatten(1)
    norms = flat.norm(dim=-1, keepdim=True)
    units = flat / (norms + eps)
    mean = (units * factors.unsqueeze(1)).sum(0)
    length = mean.norm()
    if float(length) < eps:
        if len(flat) != 2:
            raise UserError("multislerp: the directions cancel, so they have no mean.")
        mixed = (flat * factors.unsqueeze(1)).sum(0)
    else:
        mean = mean / length
        tangent = units - (units * mean).sum(-1, keepdim=True) * mean
        step = (tangent * factors.unsqueeze(1)).sum(0)
        size = step.norm() + eps
        mixed = mean * torch.cos(size) + step * (torch.sin(size) / size)
        mixed = mixed * (norms.squeeze(1) * factors).sum()
    mixed = mixed.reshape(stacked.shape[1:])
    return mixed if base is None else base + mixed


def karcher(tensors: Sequence[Tensor], *, max_iter: int = 10, tol: float = 1e-5) -> Tensor:
    """The Riemannian centre of mass of the directions, times the mean norm; equal shares.

    Vectors keep the dtype of the tensors, norms are in float32.
    """
    norms = [_norm(tensor) for tensor in tensors]
    dtype = tensors[0].dtype
    units = [(t / n).to(dtype) for t, n in zip(tensors, norms, strict=True) if float(n) > tol]
    if not units:
        return torch.zeros_like(tensors[0])
    centre = torch.zeros_like(units[0])
    for unit in units:
        centre += 1 / len(units) * unit
    length = _norm(centre)
    centre = units[0] if float(length) < tol else (centre / length).to(dtype)
    for _ in range(max_iter):
        step = torch.zeros_like(centre)
        for unit in units:
            cosine = torch.dot(centre.flatten(), unit.flatten()).clamp(-1, 1)
            angle = torch.arccos(cosine)
            if float(angle) >= tol and float(torch.sin(angle)) > 0:
                step += 1 / len(units) * (angle / torch.sin(angle)) * (unit - cosine * centre)
        size = _norm(step)
        if float(size) < tol:
            break
        centre = (torch.cos(size) * centre + torch.sin(size) * (step / size)).to(dtype)
        length = _norm(centre)
        centre = (centre / length).to(dtype) if float(length) > tol else centre
    share = 1 / len(tensors)
    return sum(share * norm for norm in norms) * centre


def _norm(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor.float())


def model_stock(
    base: Tensor, tensors: Sequence[Tensor], *, filter_wise: bool = False, clamp: bool = True
) -> Tensor:
    """Between the base and the mean of the models, by how much their task vectors agree.

    2403.19522. The share is t = N c / (1 + (N-1) c) of the mean cosine c, by row if `filter_wise`.
    `clamp` keeps it within 0 and 1; without it task vectors that point apart push the result beyond
    the base, as in mergekit.
    """
    rows = [
        t.reshape(-1, t.shape[-1]) if filter_wise and t.ndim > 1 else t.reshape(1, -1)
        for t in (base, *tensors)
    ]
    deltas = [row - rows[0] for row in rows[1:]]
    count = len(deltas)
    if count < 2:
        raise UserError(f"model_stock compares at least 2 models, not {count}.")
    cosines = []
    for i, one in enumerate(deltas):
        for other in deltas[i + 1 :]:
            norms = one.norm(dim=-1) * other.norm(dim=-1)
            product = (one * other).sum(-1)
            # Tensors that hardly moved still agree or not; only those that did not move do neither.
            tiny = torch.finfo(norms.dtype).tiny
            cosines.append((product / norms.clamp(min=tiny)).clamp(-1, 1))
    mean = torch.stack(cosines).mean(0).unsqueeze(-1)
    divisor = 1 + (count - 1) * mean
    singular = divisor.abs() < 1e-6
    share = count * mean / torch.where(singular, torch.ones_like(divisor), divisor)
    share = torch.where(singular, torch.zeros_like(share), share)
    share = share.clamp(0, 1) if clamp else share
    average = sum(rows[1:], torch.zeros_like(rows[0])) / count
    return (share * average + (1 - share) * rows[0]).reshape(base.shape)


def nearswap(base: Tensor, tensor: Tensor, t: float) -> Tensor:
    """Towards `tensor` where it is within about `t` of the base."""
    share = (t / (base - tensor).abs().clamp(min=1e-6)).clamp(0, 1)
    return share * tensor + (1 - share) * base


def arcee_fusion(base: Tensor, tensor: Tensor) -> Tensor:
    """Takes over the entries whose change is an outlier, by size times divergence of the row.

    Entries count where |change| * KL(softmax(new) || softmax(old)) of their row is at least the
    median plus 1.5 interquartile ranges; mergekit's quartiles are those of a random sample, these
    of all entries.
    """
    rows = [
        x.reshape(1, -1).float() if x.ndim < 2 else x.flatten(1).float() for x in (base, tensor)
    ]
    old, new = (row.log_softmax(dim=-1) for row in rows)
    divergence = (new.exp() * (new - old)).sum(-1, keepdim=True)
    importance = (rows[1] - rows[0]).abs() * divergence
    flat = importance.flatten().sort().values

    def quantile(share: float) -> float:
        place = share * (len(flat) - 1)
        low = int(place)
        high = min(low + 1, len(flat) - 1)
        return float(flat[low] + (flat[high] - flat[low]) * (place - low))

    median, low, high = quantile(0.5), quantile(0.25), quantile(0.75)
    mask = (importance >= median + 1.5 * (high - low)).view(base.shape)
    return base + (tensor - base) * mask.to(base.dtype)
