"""Launches of the kernels: which blocks for which number of tokens.

Shapes: T tokens, K chosen, P = T * K pairs, E experts, C columns, R rows.

The choice depends on the call alone and is never timed while it runs: another choice could sum in
another order, and a model would answer differently from one start to the next. `Blocks` are the
values that a benchmark may vary; none of them changes an order of summation within a kernel.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moekit.ops.pairs import dispatch_plan
from moekit.ops.triton.formats import ExpertFormat, MatrixFormat
from moekit.ops.triton.kernels import block_kernel, combine_kernel, vector_kernel

# Up to so many tokens each pair is computed for itself: reading weights is all that counts.
FEW_TOKENS = 4
_TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


@dataclass(frozen=True)
class Blocks:
    """Rows of a matrix that a program computes (at most 64, the tile of the records), and how many
    warps and stages it has; for many pairs also how many of them, at least 16."""

    rows: int
    warps: int
    stages: int
    pairs: int = 0


VECTOR = Blocks(rows=16, warps=4, stages=2)


def blocks_for(num_pairs: int, num_experts: int) -> Blocks:
    """Blocks for many pairs: as many of them as an expert has on average, from 16 to 64."""
    mean = num_pairs / max(1, num_experts)
    pairs = 16 if mean <= 16 else 32 if mean <= 32 else 64
    # With four warps the sums of more pairs would not all stay in registers.
    return Blocks(rows=64, warps=4 if pairs == 16 else 8, stages=3, pairs=pairs)


class Dispatch:
    """The pairs of one call, `experts` [P], and for many tokens their layout by expert.

    `blocks` takes the place of those that the number of tokens asks for.
    """

    def __init__(self, ids: Tensor, num_experts: int, blocks: Blocks | None = None) -> None:
        ids = ids.long()
        self.experts = ids.reshape(-1)
        self.num_experts = num_experts
        few = len(ids) <= FEW_TOKENS
        self.blocks = blocks or (VECTOR if few else blocks_for(ids.numel(), num_experts))
        if self.pad:
            unknown = (ids < 0) | (ids >= num_experts)
            # Choices that run nothing become an expert of their own, which no launch has.
            known = self.experts.masked_fill(unknown.reshape(-1), num_experts)
            plan = dispatch_plan(known, num_experts + 1, self.pad)
            self.pair_of_row = plan.pair_of_row
            firsts = torch.arange(0, len(plan.pair_of_row), self.pad).to(plan.ends)
            self.expert_of_block = torch.searchsorted(plan.ends, firsts, right=True)

    @property
    def pad(self) -> int:
        """Pairs of a block, to whole ones of which those of an expert are padded; 0 for none."""
        return self.blocks.pairs


def project(
    x: Tensor,
    out: Tensor,
    memory: Tensor,
    places: Tensor,
    dispatch: Dispatch,
    share: int,
    up: MatrixFormat,
    *,
    gate: MatrixFormat | None = None,
    expert: ExpertFormat | None = None,
    down: bool = False,
) -> None:
    """out [P, R] of x [P / share, C] for all pairs whose expert has a place (0 or above).

    `places` [E] count from the first byte of `memory`, in units of `kernels.UNIT`. With `expert`
    its biases are added, and its activation applied unless `down`.
    """
    settings: dict[str, Any] = settings_of(up, gate, expert, down)
    rows, cols, pairs = up.rows, up.cols, len(dispatch.experts)
    blocks = dispatch.blocks
    grid = (-(-rows // blocks.rows),)
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages, "enable_fp_fusion": True}
    with on_device(x):
        if not blocks.pairs:
            settings["GROUPS"] = max(1, 256 // up.group)
            vector_kernel[(pairs, *grid)](
                x,
                out,
                memory,
                places,
                dispatch.experts,
                dispatch.num_experts,
                share,
                rows,
                cols,
                BLOCK=blocks.rows,
                **settings,
                **options,
            )
            return
        block_kernel[(len(dispatch.expert_of_block), *grid)](
            x,
            out,
            memory,
            places,
            dispatch.pair_of_row,
            dispatch.expert_of_block,
            dispatch.num_experts,
            pairs,
            share,
            rows,
            cols,
            BLOCK=blocks.rows,
            PAIRS=blocks.pairs,
            **settings,
            **options,
        )


def settings_of(
    up: MatrixFormat, gate: MatrixFormat | None, expert: ExpertFormat | None, down: bool
) -> dict[str, Any]:
    """What the kernels are compiled for."""
    activated = expert is not None and not down
    biases = (-1, -1)
    if expert is not None:
        biases = (expert.down_bias, -1) if down else (expert.up_bias, expert.gate_bias)
    return {
        "UP": up.terms,
        "GATE": None if gate is None else gate.terms,
        "DTYPE": None if up.dtype is None else _TYPES[up.dtype],
        "GROUP": up.group,
        "UP_BIAS": biases[0],
        "GATE_BIAS": biases[1],
        "BIAS_TYPE": _TYPES[torch.float32 if expert is None else expert.bias_dtype],
        "ACTIVATION": expert.activation if expert is not None and activated else None,
        "ALPHA": 0.0 if expert is None else expert.alpha,
        "LIMIT": 0.0 if expert is None else expert.limit,
    }


def combine(parts: Tensor, weights: Tensor, dispatch: Dispatch, out: Tensor) -> None:
    """out [T, D]: parts [P, D] times weights [T, K], summed over the choices in their order."""
    tokens, top_k = weights.shape
    width, block = out.shape[1], 256
    with on_device(out):
        combine_kernel[(tokens, triton.cdiv(width, block))](
            parts,
            weights,
            dispatch.experts,
            out,
            dispatch.num_experts,
            top_k,
            width,
            BLOCK=block,
        )


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on torch's current device, which need not be that of the tensor."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
