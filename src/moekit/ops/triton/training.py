"""The forward and backward pass of `ops.lean_experts` on a GPU.

Shapes: T tokens, D width, F expert width, E experts, N pairs, H = 2F where gated and F where not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from moekit.ops.pairs import sort_pairs
from moekit.ops.triton.launch import on_device
from moekit.ops.triton.training_kernels import (
    bank_gradient_kernel,
    inner_backward_kernel,
    rows_kernel,
    sum_kernel,
)

# Rows and columns that a program computes, and the length of a step of its sums.
TILE = {"ROWS": 64, "COLS": 64, "STEP": 32}
WIDE = 256


def stages(dtype: torch.dtype) -> int:
    """Tiles on their way at once: as many as fit into 48 KiB, which every GPU gives a block."""
    return 3 if dtype.itemsize == 2 else 2


@dataclass(frozen=True)
class Places:
    """Pairs sorted by expert, cut into blocks of up to `TILE["ROWS"]` places of one expert.

    `token` [N] of every place; `begin` and `expert` of every block, E where there is none left;
    `ends` [E]; `of_token_pair` [N], the places in order of the tokens, and `begins` [T + 1].
    """

    token: Tensor
    begin: Tensor
    expert: Tensor
    ends: Tensor
    of_token_pair: Tensor
    begins: Tensor

    @classmethod
    def of(cls, token: Tensor, order: Tensor, counts: Tensor, num_tokens: int) -> Places:
        rows, num_pairs = TILE["ROWS"], len(order)
        ends = counts.cumsum(0)
        blocks = (counts + rows - 1) // rows
        last_block = blocks.cumsum(0)
        # As many blocks as any routing needs, so that no count has to be waited for.
        block = torch.arange(num_pairs // rows + len(counts), device=token.device)
        expert = torch.searchsorted(last_block, block, right=True)
        own = expert.clamp(max=len(counts) - 1)
        begin = (ends - counts)[own] + (block - (last_block - blocks)[own]) * rows
        sorted_token = token[order]
        begins = torch.zeros(num_tokens + 1, dtype=torch.int64, device=token.device)
        begins[1:] = torch.bincount(token, minlength=num_tokens).cumsum(0)
        by_token = torch.argsort(sorted_token, stable=True)
        return cls(sorted_token, begin, expert, ends, by_token, begins)


def forward(
    hidden: Tensor,
    token: Tensor,
    expert: Tensor,
    weight: Tensor,
    up: Tensor,
    down: Tensor,
    activation: str,
    gated: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output [T, D], pre-activations [N, H] sorted by expert, that order [N], counts [E]."""
    hidden, up, down = hidden.contiguous(), up.contiguous(), down.contiguous()
    order, counts = sort_pairs(expert, up.shape[0])
    places = Places.of(token, order, counts, len(hidden))
    before = hidden.new_empty(len(order), up.shape[1])
    rows = hidden.new_empty(len(order), hidden.shape[1])
    with on_device(hidden):
        _rows(hidden, up, before, places, transposed=True, gather=True)
        _rows(before, down, rows, places, transposed=True, activation=activation, gated=gated)
        out = _sum(rows, places, len(hidden), weight[order])
    return out, before, order, counts


def backward(
    grad: Tensor,
    hidden: Tensor,
    token: Tensor,
    weight: Tensor,
    up: Tensor,
    down: Tensor,
    before: Tensor,
    order: Tensor,
    counts: Tensor,
    activation: str,
    gated: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight, up and down; of size 0 where `needs` says no."""
    hidden, up, down = hidden.contiguous(), up.contiguous(), down.contiguous()
    num_experts, width, inner = down.shape
    num_pairs = len(order)
    places = Places.of(token, order, counts, len(hidden))
    none = hidden.new_empty(0)
    grad_before = torch.empty_like(before)
    scaled = before.new_empty(num_pairs, inner)
    tiles = triton.cdiv(inner, TILE["COLS"])
    shares = torch.empty(tiles, num_pairs, dtype=torch.float32, device=hidden.device)
    grad_hidden, grad_weight, grad_up, grad_down = none, none, none, none
    with on_device(hidden):
        inner_backward_kernel[(len(places.begin), tiles)](
            grad,
            places.token,
            down,
            before,
            weight[order],
            grad_before,
            scaled,
            shares,
            places.begin,
            places.expert,
            places.ends,
            num_experts,
            num_pairs,
            width,
            inner,
            ACTIVATION=activation,
            GATED=gated,
            num_stages=stages(hidden.dtype),
            **TILE,
        )
        if needs[1]:
            grad_weight = torch.empty_like(weight)
            grad_weight[order] = shares.sum(0).to(weight.dtype)
        if needs[2]:
            grad_up = torch.empty_like(up)
            _bank(grad_before, hidden, grad_up, places, gather="right")
        if needs[3]:
            grad_down = torch.empty_like(down)
            _bank(grad, scaled, grad_down, places, gather="left")
        if needs[0]:
            rows = hidden.new_empty(num_pairs, width)
            _rows(grad_before, up, rows, places, transposed=False)
            grad_hidden = _sum(rows, places, len(hidden), None)
    return grad_hidden, grad_weight, grad_up, grad_down


def _rows(
    left: Tensor,
    bank: Tensor,
    out: Tensor,
    places: Places,
    *,
    transposed: bool,
    gather: bool = False,
    activation: str | None = None,
    gated: bool = False,
) -> None:
    """out [N, C] of rows of left and the bank [E, C, K], or [E, K, C] unless `transposed`."""
    cols = out.shape[1]
    inner = bank.shape[2] if transposed else bank.shape[1]
    strides = (1, bank.shape[2]) if transposed else (bank.shape[2], 1)
    rows_kernel[(len(places.begin), triton.cdiv(cols, TILE["COLS"]))](
        left,
        places.token,
        bank,
        out,
        places.begin,
        places.expert,
        places.ends,
        bank.shape[0],
        cols,
        inner,
        left.shape[1],
        bank.stride(0),
        *strides,
        GATHER=gather,
        ACTIVATION=activation,
        GATED=gated,
        num_stages=stages(left.dtype),
        **TILE,
    )


def _bank(left: Tensor, right: Tensor, out: Tensor, places: Places, *, gather: str) -> None:
    num_left, num_right = left.shape[1], right.shape[1]
    tiles = (triton.cdiv(num_left, TILE["ROWS"]), triton.cdiv(num_right, TILE["COLS"]))
    bank_gradient_kernel[(out.shape[0], *tiles)](
        left,
        right,
        places.token,
        out,
        places.ends,
        num_left,
        num_right,
        GATHER_LEFT=gather == "left",
        GATHER_RIGHT=gather == "right",
        num_stages=stages(left.dtype),
        **TILE,
    )


def _sum(rows: Tensor, places: Places, num_tokens: int, weight: Tensor | None) -> Tensor:
    width = rows.shape[1]
    out = rows.new_empty(num_tokens, width)
    sum_kernel[(num_tokens, triton.cdiv(width, WIDE))](
        rows,
        places.of_token_pair,
        places.begins,
        rows if weight is None else weight,
        out,
        width,
        WEIGHTED=weight is not None,
        BLOCK=WIDE,
    )
    return out
