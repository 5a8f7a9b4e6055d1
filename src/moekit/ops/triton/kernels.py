"""Triton kernels that multiply with encoded matrices: weights are decoded in registers.

Shapes: P pairs of a token and an expert, C columns and R rows of a matrix, N groups of G columns.
Every sum runs over the groups in their order and no program adds to another's result, so what a
pair gets depends neither on the other pairs of a launch nor on how often something is launched.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Records begin at multiples of so many bytes; places are counted in them, which tells the compiler
# that addresses are aligned.
UNIT = tl.constexpr(64)


@triton.jit
def _load(pointers, inside):
    """What is stored, and 0 outside; `inside` None is everywhere."""
    if inside is None:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=inside, other=0)


@triton.jit
def _field(
    tiles,
    within,
    inside,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    WORD: tl.constexpr,
):
    """The bits of one field of `ops.codecs.bit_fields` for columns `within` a group.

    `WORD` is 4 along the axis of `within` and 1 along the others: four bytes of a row lie together,
    which the compiler does not see for itself and would read one by one.
    """
    SIZE: tl.constexpr = GROUP * WIDTH // 8
    byte = FIRST + within % SIZE
    places = tl.max_contiguous(tl.multiple_of(byte // 4 * 256 + byte % 4, WORD), WORD)
    packed = _load(tiles + places, inside).to(tl.int32)
    return (packed >> (within // SIZE * WIDTH)) & ((1 << WIDTH) - 1)


@triton.jit
def _by_group(record, rows, groups, num_groups, inside, AT: tl.constexpr, TYPE: tl.constexpr):
    """Numbers of which a row has one for each group, in tiles."""
    places = (rows // 64 * num_groups + groups) * 64 + rows % 64
    return _load((record + AT).to(tl.pointer_type(TYPE)) + places, inside)


@triton.jit
def _levels(
    record,
    rows,
    groups,
    within,
    num_groups,
    inside,
    TERM: tl.constexpr,
    GROUP: tl.constexpr,
    WORD: tl.constexpr,
):
    """step * code + least - zero of a term: whole numbers below 256, exact in any format."""
    BITS: tl.constexpr = TERM[3]
    tiles = record + TERM[0] + (rows // 64 * num_groups + groups) * (8 * GROUP * BITS)
    tiles += rows % 64 * 4
    if BITS == 3:
        codes = _field(tiles, within, inside, 0, 2, GROUP, WORD)
        codes += _field(tiles, within, inside, GROUP // 4, 1, GROUP, WORD) * 4
    else:
        codes = _field(tiles, within, inside, 0, BITS, GROUP, WORD)
    levels = codes * TERM[4] + TERM[5]
    if TERM[2] >= 0:
        zero = _by_group(record, rows, groups, num_groups, inside, TERM[2], tl.uint8)
        levels -= zero.to(tl.int32)
    return levels.to(tl.float32)


@triton.jit
def _times_vector(
    x,
    record,
    first_row,
    num_rows,
    num_cols,
    TERMS: tl.constexpr,
    DTYPE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Rows [BLOCK] of a matrix times x [C], `GROUPS` groups at a time."""
    rows = (first_row + tl.arange(0, BLOCK))[:, None, None]
    within = tl.arange(0, GROUP)[None, None, :]
    num_groups = tl.cdiv(num_cols, GROUP)
    total = tl.zeros([BLOCK, GROUPS], dtype=tl.float32)
    for first in range(0, num_groups, GROUPS):
        groups = (first + tl.arange(0, GROUPS))[None, :, None]
        cols = groups * GROUP + within
        values = tl.load(x + cols, mask=cols < num_cols, other=0.0).to(tl.float32)
        if DTYPE is None:
            inside = groups < num_groups
            for term in tl.static_range(len(TERMS)):
                levels = _levels(
                    record,
                    rows,
                    groups,
                    within,
                    num_groups,
                    inside,
                    TERMS[term],
                    GROUP,
                    (1, 1, 4),
                )
                scale = _by_group(
                    record,
                    tl.reshape(rows, [BLOCK, 1]),
                    tl.reshape(groups, [1, GROUPS]),
                    num_groups,
                    tl.reshape(inside, [1, GROUPS]),
                    TERMS[term][1],
                    tl.float16,
                )
                total += tl.sum(levels * values, axis=2) * scale.to(tl.float32)
        else:
            plain = (record + TERMS[0][0]).to(tl.pointer_type(DTYPE))
            inside = (rows < num_rows) & (cols < num_cols)
            weights = tl.load(plain + rows * num_cols + cols, mask=inside, other=0.0)
            total += tl.sum(weights.to(tl.float32) * values, axis=2)
    return tl.sum(total, axis=1)


@triton.jit
def _times_block(
    total,
    x,
    row_of_x,
    valid,
    record,
    first_row,
    num_rows,
    num_cols,
    TERMS: tl.constexpr,
    DTYPE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`total` [M, BLOCK] and x [M, C] times the transposed rows [BLOCK] of a matrix.

    Levels are exact in the number format of x; scales are applied to the sums, in float32.
    """
    rows = (first_row + tl.arange(0, BLOCK))[None, :]
    within = tl.arange(0, GROUP)
    num_groups = tl.cdiv(num_cols, GROUP)
    for group in range(0, num_groups):
        cols = group * GROUP + within
        mask = valid[:, None] & (cols < num_cols)[None, :]
        values = tl.load(x + row_of_x[:, None] * num_cols + cols[None, :], mask=mask, other=0.0)
        if DTYPE is None:
            for term in tl.static_range(len(TERMS)):
                levels = _levels(
                    record,
                    rows,
                    group,
                    within[:, None],
                    num_groups,
                    None,
                    TERMS[term],
                    GROUP,
                    (4, 1),
                )
                scale = _by_group(record, rows, group, num_groups, None, TERMS[term][1], tl.float16)
                sums = tl.dot(values, levels.to(values.dtype), input_precision="ieee")
                total += sums * scale.to(tl.float32)
        else:
            plain = (record + TERMS[0][0]).to(tl.pointer_type(DTYPE))
            inside = (rows < num_rows) & (cols < num_cols)[:, None]
            weights = tl.load(plain + rows * num_cols + cols[:, None], mask=inside, other=0.0)
            total += tl.dot(values, weights.to(values.dtype), input_precision="ieee")
    return total


@triton.jit
def _with_bias(values, record, rows, num_rows, AT: tl.constexpr, TYPE: tl.constexpr):
    if AT >= 0:
        biases = (record + AT).to(tl.pointer_type(TYPE))
        values += tl.load(biases + rows, mask=rows < num_rows, other=0.0).to(tl.float32)
    return values


@triton.jit
def _activated(gate, up, NAME: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    """The activation of `gate` times `up`."""
    if NAME == "silu":
        return gate * tl.sigmoid(gate) * up
    elif NAME == "gelu":
        return 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)) * up
    elif NAME == "gelu_tanh":
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        return gate * tl.sigmoid(2.0 * inner) * up
    elif NAME == "relu":
        return tl.maximum(gate, 0.0) * up
    elif NAME == "relu2":
        positive = tl.maximum(gate, 0.0)
        return positive * positive * up
    elif NAME == "quick_gelu":
        return gate * tl.sigmoid(1.702 * gate) * up
    else:
        tl.static_assert(NAME == "clamped_swiglu", "an activation without a kernel")
        low = tl.minimum(gate, LIMIT)
        clamped = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
        return (clamped + 1.0) * low * tl.sigmoid(ALPHA * low)


@triton.jit
def vector_kernel(
    x,
    out,
    memory,
    places,
    experts,
    num_experts,
    share,
    num_rows,
    num_cols,
    UP: tl.constexpr,
    GATE: tl.constexpr,
    DTYPE: tl.constexpr,
    GROUP: tl.constexpr,
    UP_BIAS: tl.constexpr,
    GATE_BIAS: tl.constexpr,
    BIAS_TYPE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """out [P, R] for few pairs: a program computes `BLOCK` rows of one pair.

    Pair p reads row p // `share` of x and the matrices of `experts`[p], whose record begins at
    `places`[e] units of `memory`; those whose place is below 0 are left alone. Without `ACTIVATION`
    the result is the product with the matrix UP.
    """
    pair = tl.program_id(0)
    expert = tl.load(experts + pair)
    known = (expert >= 0) & (expert < num_experts)
    place = tl.load(places + expert, mask=known, other=-1)
    if place < 0:
        return
    record = memory + place * UNIT
    first_row = tl.program_id(1) * BLOCK
    rows = first_row + tl.arange(0, BLOCK)
    row = x + (pair // share).to(tl.int64) * num_cols
    values = _times_vector(
        row, record, first_row, num_rows, num_cols, UP, DTYPE, GROUP, BLOCK, GROUPS
    )
    values = _with_bias(values, record, rows, num_rows, UP_BIAS, BIAS_TYPE)
    if ACTIVATION is not None:
        if GATE is None:
            values = _activated(values, 1.0, ACTIVATION, ALPHA, LIMIT)
        else:
            gate = _times_vector(
                row, record, first_row, num_rows, num_cols, GATE, DTYPE, GROUP, BLOCK, GROUPS
            )
            gate = _with_bias(gate, record, rows, num_rows, GATE_BIAS, BIAS_TYPE)
            values = _activated(gate, values, ACTIVATION, ALPHA, LIMIT)
    target = out + pair.to(tl.int64) * num_rows + rows
    tl.store(target, values.to(out.dtype.element_ty), mask=rows < num_rows)


@triton.jit
def block_kernel(
    x,
    out,
    memory,
    places,
    pair_of_row,
    expert_of_block,
    num_experts,
    num_pairs,
    share,
    num_rows,
    num_cols,
    UP: tl.constexpr,
    GATE: tl.constexpr,
    DTYPE: tl.constexpr,
    GROUP: tl.constexpr,
    UP_BIAS: tl.constexpr,
    GATE_BIAS: tl.constexpr,
    BIAS_TYPE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """out [P, R] for many pairs: a program computes `BLOCK` rows of `PAIRS` pairs of an expert.

    Pairs are laid out by expert, each expert's padded to whole blocks: `pair_of_row` is the pair in
    each place, or `num_pairs`. The rest is as in `vector_kernel`.
    """
    block = tl.program_id(0)
    expert = tl.load(expert_of_block + block)
    place = tl.load(places + expert, mask=expert < num_experts, other=-1)
    if place < 0:
        return
    record = memory + place * UNIT
    first_row = tl.program_id(1) * BLOCK
    rows = first_row + tl.arange(0, BLOCK)
    pairs = tl.load(pair_of_row + block * PAIRS + tl.arange(0, PAIRS)).to(tl.int64)
    valid = pairs < num_pairs
    row_of_x = pairs // share
    values = tl.zeros([PAIRS, BLOCK], dtype=tl.float32)
    values = _times_block(
        values, x, row_of_x, valid, record, first_row, num_rows, num_cols, UP, DTYPE, GROUP, BLOCK
    )
    values = _with_bias(values, record, rows[None, :], num_rows, UP_BIAS, BIAS_TYPE)
    if ACTIVATION is not None:
        if GATE is None:
            values = _activated(values, 1.0, ACTIVATION, ALPHA, LIMIT)
        else:
            gate = tl.zeros([PAIRS, BLOCK], dtype=tl.float32)
            gate = _times_block(
                gate,
                x,
                row_of_x,
                valid,
                record,
                first_row,
                num_rows,
                num_cols,
                GATE,
                DTYPE,
                GROUP,
                BLOCK,
            )
            gate = _with_bias(gate, record, rows[None, :], num_rows, GATE_BIAS, BIAS_TYPE)
            values = _activated(gate, values, ACTIVATION, ALPHA, LIMIT)
    target = out + pairs[:, None] * num_rows + rows[None, :]
    mask = valid[:, None] & (rows < num_rows)[None, :]
    tl.store(target, values.to(out.dtype.element_ty), mask=mask)


@triton.jit
def combine_kernel(parts, weights, experts, out, num_experts, top_k, width, BLOCK: tl.constexpr):
    """out [T, D]: the weighted sum of parts [T * K, D] over the choices, in their order."""
    token = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for choice in range(0, top_k):
        pair = token.to(tl.int64) * top_k + choice
        expert = tl.load(experts + pair)
        used = (expert >= 0) & (expert < num_experts)
        weight = tl.load(weights + pair, mask=used, other=0.0).to(tl.float32)
        inside = cols < tl.where(used, width, 0)
        total += weight * tl.load(parts + pair * width + cols, mask=inside, other=0.0)
    target = out + token.to(tl.int64) * width + cols
    tl.store(target, total.to(out.dtype.element_ty), mask=cols < width)
