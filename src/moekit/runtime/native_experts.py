"""Experts run by the native kernels straight from their records.

Shapes: T tokens, K chosen, D width, F expert width, P pairs of a token and an expert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moekit.core.layer import MoELayer
from moekit.core.packed import PackedLayer
from moekit.ops.activations import ACTIVATIONS
from moekit.ops.native import ExpertFormat, Pool
from moekit.ops.native.structures import F32
from moekit.runtime.expert_formats import formats_of_layer

# Values at which the gate of a family is compared with those of the kernels, far enough out to see
# a limit.
_PROBE = 64


def native_experts(
    layer: MoELayer, packed: PackedLayer, dtype: torch.dtype, pool: Pool
) -> NativeExperts | None:
    """The experts of a layer as the kernels run them, or None where they cannot as exactly.

    Where the model computes in float32, kernels that round activations to 16 bits are left out.
    """
    if type(layer) is not MoELayer or getattr(layer.experts, "has_post_expert_norm", False):
        return None
    found = activation_of(layer.experts)
    if found is None:
        return None
    name, alpha, limit = found
    formats = formats_of_layer(packed, name, alpha=alpha, limit=limit)
    if formats is None:
        return None
    exact = all(f.up.kind == f.down.kind == F32 for f in formats)
    return NativeExperts(formats, pool) if exact or dtype != torch.float32 else None


class NativeExperts:
    """One layer, by the formats of its experts."""

    def __init__(self, formats: list[ExpertFormat], pool: Pool) -> None:
        self._formats = formats
        self._pool = pool

    def start(
        self, hidden: Tensor, ids: Tensor, weights: Tensor, sizes: Sequence[int] | None = None
    ) -> NativeCall:
        """Begin one call of the layer's experts: hidden [T, D], ids and weights [T, K].

        No token's result depends on the others, so it does not matter which belong together.
        """
        return NativeCall(self._formats, self._pool, hidden, ids, weights)


class NativeCall:
    """The outputs [P, D] of one call, pairs sorted by expert."""

    def __init__(
        self,
        formats: list[ExpertFormat],
        pool: Pool,
        hidden: Tensor,
        ids: Tensor,
        weights: Tensor,
    ) -> None:
        self._formats, self._pool = formats, pool
        self._dtype = hidden.dtype
        self._hidden = hidden.float().contiguous()
        self._weights = weights.float().contiguous()
        flat = ids.flatten()
        order = flat.argsort(stable=True)
        order = order[flat[order] >= 0]
        self._token_of_pair = (order // ids.shape[1]).to(torch.int32)
        self._pair_of = torch.full(flat.shape, -1, dtype=torch.int32)
        self._pair_of[order] = torch.arange(len(order), dtype=torch.int32)
        self._pair_of = self._pair_of.view(ids.shape)
        experts, counts = flat[order].unique_consecutive(return_counts=True)
        firsts = counts.cumsum(0) - counts
        self._pairs = {
            e: (first, count)
            for e, first, count in zip(
                experts.tolist(), firsts.tolist(), counts.tolist(), strict=True
            )
        }
        self._out = torch.empty(len(order), hidden.shape[1])

    def run(self, records: dict[int, Tensor]) -> None:
        """Compute some of the chosen experts from their records."""
        jobs = [
            (self._formats[e], record.data_ptr(), *self._pairs[e]) for e, record in records.items()
        ]
        self._pool.ffn(jobs, self._token_of_pair, self._hidden, self._out)

    def result(self) -> Tensor:
        """The weighted sum over the choices, [T, D]."""
        summed = torch.empty_like(self._hidden)
        self._pool.combine(self._out, self._pair_of, self._weights, summed)
        return summed.to(self._dtype)


def activation_of(experts: torch.nn.Module) -> tuple[str, float, float] | None:
    """Which function of the kernels the gate of a fused bank is, with its alpha and limit.

    Found by comparing values, so a family that overrides its gate is seen. None for another one.
    """
    gated = getattr(experts, "has_gate", True)
    gate = torch.linspace(-60, 60, _PROBE).repeat(2, 1)
    up = torch.linspace(60, -60, 2 * _PROBE).view(2, _PROBE)
    joined = torch.cat([gate, up], dim=-1) if gated else up
    if gated and not getattr(experts, "is_concatenated", True):
        joined = torch.stack([gate, up], dim=-1).flatten(1)
    own = _own_gate(experts, joined, gated)
    for name, activation in ACTIVATIONS.items():
        expected = activation.forward(gate) * up if gated else activation.forward(up)
        if torch.allclose(own, expected, atol=1e-5):
            return name, 0.0, 0.0
    alpha, limit = getattr(experts, "alpha", None), getattr(experts, "limit", None)
    if gated and isinstance(alpha, float) and isinstance(limit, float):
        clamped = gate.clamp(max=limit)
        product = (up.clamp(-limit, limit) + 1) * clamped * torch.sigmoid(alpha * clamped)
        if torch.allclose(own, product, atol=1e-5):
            return "clamped_swiglu", alpha, limit
    return None


def _own_gate(experts: torch.nn.Module, joined: Tensor, gated: bool) -> Tensor:
    act_fn: Callable[[Tensor], Tensor] | None = getattr(experts, "act_fn", None)
    own: Callable[[Tensor], Tensor] | None = getattr(experts, "_apply_gate", None)
    if gated and own is not None:
        return own(joined)
    if act_fn is None:
        return torch.full_like(joined, float("nan"))
    if not gated:
        return act_fn(joined)
    gate, up = joined.chunk(2, dim=-1)
    return act_fn(gate) * up
