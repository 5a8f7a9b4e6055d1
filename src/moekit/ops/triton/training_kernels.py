"""Kernels for training experts: products of rows sorted by expert, with gathers and activations
fused into their loads and the whole of the inner backward pass into one epilogue.

Shapes: T tokens, D width, F expert width, E experts, N pairs in places sorted by expert, H = 2F
where gated and F where not. A block is up to `ROWS` places of one expert: its first place is
`begin_of_block`, its expert `expert_of_block` (E: nothing to do), and `ends` [E] is the exclusive
end of every expert's places. Sums are float32 and in a fixed order; nothing is added atomically.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moekit.ops.triton.kernels import _activated


@triton.jit
def _slope(x, NAME: tl.constexpr):
    """The derivative of an activation."""
    if NAME == "silu":
        share = tl.sigmoid(x)
        return share * (1.0 + x * (1.0 - share))
    elif NAME == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density
    elif NAME == "gelu_tanh":
        inner = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        share = tl.sigmoid(inner)
        return share + x * share * (1.0 - share) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    elif NAME == "relu":
        return tl.where(x > 0.0, 1.0, 0.0)
    elif NAME == "relu2":
        return 2.0 * tl.maximum(x, 0.0)
    else:
        tl.static_assert(NAME == "quick_gelu", "an activation without a derivative")
        share = tl.sigmoid(1.702 * x)
        return share + 1.702 * x * share * (1.0 - share)


@triton.jit
def rows_kernel(
    left,
    source,
    weight,
    out,
    begin_of_block,
    expert_of_block,
    ends,
    num_experts,
    num_cols,
    num_inner,
    left_stride,
    expert_stride,
    inner_stride,
    col_stride,
    GATHER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STEP: tl.constexpr,
):
    """out [N, C] = rows of left times the matrix of their expert.

    Row p reads left[`source`[p]] with `GATHER`, else left[p]. With `ACTIVATION` left [N, H] holds
    pre-activations, which are activated as they are loaded. Element (inner, col) of expert e lies
    at the three strides of `weight`.
    """
    block = tl.program_id(0)
    expert = tl.load(expert_of_block + block).to(tl.int64)
    if expert >= num_experts:
        return
    places = tl.load(begin_of_block + block).to(tl.int64) + tl.arange(0, ROWS)
    valid = places < tl.load(ends + expert)
    at = places
    if GATHER:
        at = tl.load(source + places, mask=valid, other=0).to(tl.int64)
    rows = left + at[:, None] * left_stride
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    matrix = weight + expert * expert_stride + cols[None, :] * col_stride
    total = tl.zeros([ROWS, COLS], dtype=tl.float32)
    for first in range(0, num_inner, STEP):
        inner = first + tl.arange(0, STEP)
        mask = valid[:, None] & (inner < num_inner)[None, :]
        values = tl.load(rows + inner[None, :], mask=mask, other=0.0)
        if ACTIVATION is not None:
            up = 1.0
            if GATED:
                up = tl.load(rows + num_inner + inner[None, :], mask=mask, other=0.0).to(tl.float32)
            made = _activated(values.to(tl.float32), up, ACTIVATION, 0.0, 0.0)
            values = made.to(values.dtype)
        inside = (inner < num_inner)[:, None] & (cols < num_cols)[None, :]
        part = tl.load(matrix + inner[:, None] * inner_stride, mask=inside, other=0.0)
        total += tl.dot(values, part, input_precision="ieee")
    target = out + places[:, None] * num_cols + cols[None, :]
    mask = valid[:, None] & (cols < num_cols)[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def inner_backward_kernel(
    grad,
    source,
    down,
    before,
    scale,
    grad_before,
    scaled,
    shares,
    begin_of_block,
    expert_of_block,
    ends,
    num_experts,
    num_pairs,
    width,
    num_inner,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STEP: tl.constexpr,
):
    """From grad [T, D] to what the other products of the backward pass need.

    With g = grad[token] W2 and A the activations of before [N, H]: grad_before [N, H], scaled
    [N, F] = `scale` A, and in row j of shares [C, N] the sum of g A over the j-th columns.
    """
    block = tl.program_id(0)
    expert = tl.load(expert_of_block + block).to(tl.int64)
    if expert >= num_experts:
        return
    places = tl.load(begin_of_block + block).to(tl.int64) + tl.arange(0, ROWS)
    valid = places < tl.load(ends + expert)
    token = tl.load(source + places, mask=valid, other=0).to(tl.int64)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    matrix = down + expert * width * num_inner + cols[None, :]
    total = tl.zeros([ROWS, COLS], dtype=tl.float32)
    for first in range(0, width, STEP):
        inner = first + tl.arange(0, STEP)
        mask = valid[:, None] & (inner < width)[None, :]
        values = tl.load(grad + token[:, None] * width + inner[None, :], mask=mask, other=0.0)
        inside = (inner < width)[:, None] & (cols < num_inner)[None, :]
        part = tl.load(matrix + inner[:, None] * num_inner, mask=inside, other=0.0)
        total += tl.dot(values, part, input_precision="ieee")
    mask = valid[:, None] & (cols < num_inner)[None, :]
    stride = 2 * num_inner if GATED else num_inner
    at = places[:, None] * stride + cols[None, :]
    gate = tl.load(before + at, mask=mask, other=0.0).to(tl.float32)
    outer = _activated(gate, 1.0, ACTIVATION, 0.0, 0.0)
    middle = outer
    weight = tl.load(scale + places, mask=valid, other=0.0).to(tl.float32)[:, None]
    inward = total * weight
    if GATED:
        up = tl.load(before + at + num_inner, mask=mask, other=0.0).to(tl.float32)
        middle = outer * up
        tl.store(
            grad_before + at + num_inner,
            (inward * outer).to(grad_before.dtype.element_ty),
            mask=mask,
        )
        inward = inward * up
    slope = inward * _slope(gate, ACTIVATION)
    tl.store(grad_before + at, slope.to(grad_before.dtype.element_ty), mask=mask)
    tl.store(
        scaled + places[:, None] * num_inner + cols[None, :],
        (middle * weight).to(scaled.dtype.element_ty),
        mask=mask,
    )
    share = tl.sum(tl.where(mask, total * middle, 0.0), axis=1)
    tl.store(shares + tl.program_id(1).to(tl.int64) * num_pairs + places, share, mask=valid)


@triton.jit
def bank_gradient_kernel(
    left,
    right,
    source,
    out,
    ends,
    num_left,
    num_right,
    GATHER_LEFT: tl.constexpr,
    GATHER_RIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STEP: tl.constexpr,
):
    """out [E, L, R]: for every expert the sum over its places of left [., L]^T right [., R].

    A side that is gathered is read at `source`[p] in place of p. Experts without a place get zeros.
    """
    expert = tl.program_id(0).to(tl.int64)
    begin = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends + expert)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(2) * COLS + tl.arange(0, COLS)
    total = tl.zeros([ROWS, COLS], dtype=tl.float32)
    for first in range(begin, end, STEP):
        places = first + tl.arange(0, STEP)
        valid = places < end
        token = places
        if GATHER_LEFT or GATHER_RIGHT:
            token = tl.load(source + places, mask=valid, other=0).to(tl.int64)
        from_left = token if GATHER_LEFT else places
        from_right = token if GATHER_RIGHT else places
        a = tl.load(
            left + from_left[None, :] * num_left + rows[:, None],
            mask=valid[None, :] & (rows < num_left)[:, None],
            other=0.0,
        )
        b = tl.load(
            right + from_right[:, None] * num_right + cols[None, :],
            mask=valid[:, None] & (cols < num_right)[None, :],
            other=0.0,
        )
        total += tl.dot(a, b, input_precision="ieee")
    target = out + (expert * num_left + rows[:, None]) * num_right + cols[None, :]
    mask = (rows < num_left)[:, None] & (cols < num_right)[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def sum_kernel(
    rows,
    place_of_token_pair,
    begins,
    weights,
    out,
    width,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out [T, D]: of every token the sum of its rows [N, D], times their weights if `WEIGHTED`.

    The pairs of token t are `begins`[t] to `begins`[t + 1]; a pair's row, and its weight, are at
    `place_of_token_pair`.
    """
    token = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < width
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for pair in range(tl.load(begins + token), tl.load(begins + token + 1)):
        place = tl.load(place_of_token_pair + pair).to(tl.int64)
        row = tl.load(rows + place * width + cols, mask=inside, other=0.0).to(tl.float32)
        if WEIGHTED:
            row = row * tl.load(weights + place).to(tl.float32)
        total += row
    target = out + token.to(tl.int64) * width + cols
    tl.store(target, total.to(out.dtype.element_ty), mask=inside)
