"""The matrix from latents to keys and values (MLA), taken apart by heads for the native decoder.

Shapes: H heads, R width of the latent, N width of a key without what is rotated, V of a value.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moekit.ops.native.decoder import Linear
from moekit.ops.native.formats import plain_format


@dataclass(frozen=True)
class LatentHeads:
    """For each head what turns its query into one of latents, and latents into its value.

    `keys` [H, R, N] and `values` [H, V, R]. Keys are transposed, so neither is read as a codec
    would have stored the whole: both are kept in a floating-point format.
    """

    keys: Tensor
    values: Tensor

    @classmethod
    def of(cls, weight: Tensor, heads: int, value_dim: int, dtype: torch.dtype) -> LatentHeads:
        """Of `kv_b_proj` [H * (N + V), R]; copies it."""
        by_head = weight.view(heads, -1, weight.shape[1])
        own = by_head.shape[1] - value_dim
        keys = by_head[:, :own].transpose(1, 2)
        return cls(
            torch.empty(keys.shape, dtype=dtype).copy_(keys),
            by_head[:, own:].to(dtype, copy=True, memory_format=torch.contiguous_format),
        )

    def linears(self) -> tuple[Any, Any]:
        """`k_heads` and `v_heads` of a layer, which point into these tensors."""
        return _linears(self.keys), _linears(self.values)


def _linears(matrices: Tensor) -> Any:
    format = ctypes.pointer(plain_format((matrices.shape[1], matrices.shape[2]), matrices.dtype))
    return (Linear * len(matrices))(*[Linear(format, matrix.data_ptr()) for matrix in matrices])
