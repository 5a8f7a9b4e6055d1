"""AutoRound: learning which way each weight is rounded, and how far each range reaches.

AutoRound, arXiv 2309.05516, expert by expert: the signs of the gradients of the error of the
expert's weighted output move an offset for each weight and a share of each end of a range.

Shapes: n tokens, D width, O rows, N groups a row, G columns a group.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from moekit.compress.quantize.layer_experts import middle_of, output_of
from moekit.core.expert_weights import ExpertWeights
from moekit.core.layer import MoELayer
from moekit.ops.codecs import Encoded
from moekit.ops.codecs.codec import rounded_up
from moekit.ops.codecs.grid import Grid
from moekit.ops.codecs.groups import GroupCodec

STEPS = 200
# No range becomes less than this share of what it was.
SMALLEST_SHARE = 0.1
MATRICES = ("gate", "up", "down")


@dataclass
class _Learned:
    """What is learned of one matrix [O, N, G]: offsets [O, N, G] and shares of the ends [2, O, N].

    Weights are those of the expert in groups.
    """

    weights: Tensor
    offsets: Tensor
    shares: Tensor

    @classmethod
    def of(cls, weight: Tensor, group_size: int) -> _Learned:
        grouped = weight.float().unflatten(1, (-1, group_size))
        shares = torch.ones(2, *grouped.shape[:2])
        return cls(grouped, torch.zeros_like(grouped).requires_grad_(), shares.requires_grad_())

    @property
    def parameters(self) -> tuple[Tensor, Tensor]:
        return self.offsets, self.shares

    def range(self, codec: GroupCodec) -> tuple[Tensor, Tensor]:
        """Step and zero point [O, N] of the grids that the shares leave, differentiable."""
        low = self.weights.amin(-1).clamp(max=0) * self.shares[0]
        high = self.weights.amax(-1).clamp(min=0) * self.shares[1]
        if codec.zero_point:
            step = ((high - low) / (2**codec.bits - 1)).clamp(min=1e-9)
            zero = -low / step
            return step, zero + (zero.round() - zero).detach()
        largest = self.weights.abs().amax(-1) * self.shares[0]
        middle = 2 ** (codec.bits - 1)
        step = (largest / (middle - 1)).clamp(min=1e-9)
        return step, torch.full_like(step, float(middle))

    def rounded(self, codec: GroupCodec) -> Tensor:
        """The matrix [O, I] as it would be stored, with gradients as if nothing was rounded."""
        step, zero = (value[..., None] for value in self.range(codec))
        levels = self.weights / step + self.offsets + zero
        levels = levels + (levels.round() - levels).detach()
        return ((levels.clamp(0, 2**codec.bits - 1) - zero) * step).flatten(1)

    def encode(self, codec: GroupCodec) -> Encoded:
        """The matrix with the step rounded to what is stored."""
        with torch.no_grad():
            step, zero = self.range(codec)
            grid: Grid = {"scale": rounded_up(step, "scale")}
            if codec.zero_point:
                grid["zero"] = zero.clamp(0, 2**codec.bits - 1).to(torch.uint8)
            stored = grid["scale"].float()[..., None]
            base = grid["zero"].float()[..., None] if codec.zero_point else zero[..., None]
            levels = (self.weights / stored + self.offsets + base).round()
            plane = codec.pack(levels.clamp(0, 2**codec.bits - 1), grid)
        rows, groups, size = self.weights.shape
        return Encoded((rows, groups * size), (plane,))

    def copy(self) -> _Learned:
        return _Learned(self.weights, self.offsets.detach().clone(), self.shares.detach().clone())


def autoround(
    layer: MoELayer,
    expert: ExpertWeights,
    codec: GroupCodec,
    hidden: Tensor,
    gates: Tensor,
    *,
    steps: int = STEPS,
) -> dict[str, Encoded]:
    """The matrices of an expert encoded, fitted to its tokens hidden [n, D] with gates [n].

    `layer` gives the activation; its own weights are not read. Every step moves each offset (within
    a half) and share by a rate that falls from 1 / `steps` to zero; the best of all steps, rounding
    to nearest among them, is kept.
    """
    parts = expert.tensors()
    learned = {n: _Learned.of(parts[n], codec.group_size) for n in MATRICES if n in parts}
    plain = dataclasses.replace(expert, **{n: p.float() for n, p in parts.items()})
    with torch.no_grad():
        wanted = output_of(layer, plain, middle_of(layer, plain, hidden)) * gates[:, None]
    best, least = {name: each.copy() for name, each in learned.items()}, float("inf")
    parameters = [p for each in learned.values() for p in each.parameters]
    for step in range(steps + 1):
        made = {name: each.rounded(codec) for name, each in learned.items()}
        candidate = dataclasses.replace(plain, **made)
        found = output_of(layer, candidate, middle_of(layer, candidate, hidden)) * gates[:, None]
        loss = (found - wanted).square().mean()
        if float(loss.detach()) < least:
            best, least = {n: each.copy() for n, each in learned.items()}, float(loss.detach())
        if step == steps:
            break
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        rate = (1 - step / steps) / steps
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    parameter -= rate * gradient.sign()
            for each in learned.values():
                each.offsets.clamp_(-0.5, 0.5)
                each.shares.clamp_(SMALLEST_SHARE, 1)
    return {name: each.encode(codec) for name, each in best.items()}
