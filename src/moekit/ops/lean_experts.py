"""Experts that keep only their inputs and pre-activations for the backward pass.

SonicMoE (arXiv 2512.14080): the gradient of a routing weight, <grad_out, Y>, equals <g, A> with
g = W2^T grad_out, which the backward pass computes anyway; so neither the expert outputs Y nor the
activations A nor the gathered inputs are saved, and nothing but A is computed twice.

Letters: T tokens, D width, F expert width, E experts, N pairs, H = 2F where gated and F where not.

The two passes are opaque operators, so that `torch.compile` leaves them whole. On a CPU they go
expert by expert, because the rows of one expert stay in its cache from the first product to the
last. In 16 bits an expert's rows are rounded up to a multiple of `PAD`: oneDNN builds and caches
one kernel per matrix shape, and raw counts would make almost every product a new one. The rows
that fill up are the next expert's: whatever is computed for them is overwritten or set to zero.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from moekit.ops import triton
from moekit.ops.activations import ACTIVATIONS
from moekit.ops.pairs import PAD, sort_pairs


class LeanExperts(torch.autograd.Function):
    """Sum over pairs of weight * expert(hidden[token]): [T, D].

    `hidden` [T, D], `token`, `expert` (int64) and `weight` [N], banks `up` [E, H, D] and `down`
    [E, D, F], all of one dtype. Saves `hidden`, the pre-activations [N, H] and N weights and
    indices. Gradients of what does not need them are not computed.
    """

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        token: Tensor,
        expert: Tensor,
        weight: Tensor,
        up: Tensor,
        down: Tensor,
        activation: str,
        gated: bool,
    ) -> Tensor:
        ctx.activation, ctx.gated = activation, gated
        out, before, order, counts = _forward(
            hidden, token, expert, weight, up, down, activation, gated
        )
        ctx.save_for_backward(hidden, token, weight, up, down, before, order, counts)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        needs = ctx.needs_input_grad
        grads = _backward(
            grad.contiguous(),
            *ctx.saved_tensors,
            ctx.activation,
            ctx.gated,
            [needs[0], needs[3], needs[4], needs[5]],
        )
        hidden, weight, up, down = (
            made if needed else None
            for made, needed in zip(grads, (needs[0], needs[3], needs[4], needs[5]), strict=True)
        )
        return hidden, None, None, weight, up, down, None, None


@torch.library.custom_op("moekit::lean_experts", mutates_args=())
def _forward(
    hidden: Tensor,
    token: Tensor,
    expert: Tensor,
    weight: Tensor,
    up: Tensor,
    down: Tensor,
    activation: str,
    gated: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output [T, D]; the pre-activations, sorted by expert; that order [N]; and counts [E]."""
    if has_kernels(hidden):
        from moekit.ops.triton import training

        return training.forward(hidden, token, expert, weight, up, down, activation, gated)
    order, counts = sort_pairs(expert, up.shape[0])
    slack, inner = _pad(hidden) - 1, down.shape[2]
    act = ACTIVATIONS[activation].forward
    before = hidden.new_empty(len(order) + slack, up.shape[1])
    rows = hidden.new_empty(len(order) + slack, hidden.shape[1])
    source = _with_slack(token[order], slack)
    for e, begin, _, end in _groups(counts, _pad(hidden)):
        wide = torch.mm(hidden.index_select(0, source[begin:end]), up[e].t(), out=before[begin:end])
        middle = act(wide[:, :inner])
        if gated:
            middle *= wide[:, inner:]
        torch.mm(middle, down[e].t(), out=rows[begin:end])
    return _sum_by_token(rows, order, token, len(hidden), weight), before, order, counts


@_forward.register_fake
def _(hidden, token, expert, weight, up, down, activation, gated):
    rows = len(token) + _pad(hidden) - 1
    return (
        torch.empty_like(hidden),
        hidden.new_empty(rows, up.shape[1]),
        torch.empty_like(expert),
        expert.new_empty(up.shape[0]),
    )


@torch.library.custom_op("moekit::lean_experts_backward", mutates_args=())
def _backward(
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
    if has_kernels(hidden):
        from moekit.ops.triton import training

        kept = (before, order, counts)
        return training.backward(
            grad, hidden, token, weight, up, down, *kept, activation, gated, needs
        )
    slack, inner, act = _pad(hidden) - 1, down.shape[2], ACTIVATIONS[activation]
    need_hidden, need_weight, need_up, need_down = needs
    source = _with_slack(token[order], slack)
    scale = _with_slack(weight[order], slack).unsqueeze(1)
    rows = hidden.new_empty(len(before) if need_hidden else 0, hidden.shape[1])
    shares = torch.empty_like(weight) if need_weight else weight.new_empty(0)
    grad_up = torch.zeros_like(up) if need_up else up.new_empty(0)
    grad_down = torch.zeros_like(down) if need_down else down.new_empty(0)
    for e, begin, last, end in _groups(counts, _pad(hidden)):
        n, at = last - begin, source[begin:end]
        incoming = grad.index_select(0, at)
        inward = torch.mm(incoming, down[e])
        wide = before[begin:end]
        gate = wide[:, :inner]
        outer = act.forward(gate)
        middle = outer * wide[:, inner:] if gated else outer
        if need_weight:
            torch.sum(inward[:n] * middle[:n], 1, out=shares[begin:last])
        inward *= scale[begin:end]
        if need_down:
            scaled = middle * scale[begin:end]
            scaled[n:] = 0
            torch.mm(incoming.t(), scaled, out=grad_down[e])
        if not (need_up or need_hidden):
            continue
        grad_wide = torch.empty_like(wide)
        if gated:
            torch.mul(inward, outer, out=grad_wide[:, inner:])
            inward *= wide[:, inner:]
        grad_wide[:, :inner] = act.backward(inward, gate)
        if need_up:
            grad_wide[n:] = 0
            torch.mm(grad_wide.t(), hidden.index_select(0, at), out=grad_up[e])
        if need_hidden:
            torch.mm(grad_wide, up[e], out=rows[begin:end])
    grad_hidden = rows
    if need_hidden:
        grad_hidden = _sum_by_token(rows, order, token, len(hidden), None)
    grad_weight = torch.empty_like(shares).index_copy(0, order, shares) if need_weight else shares
    return grad_hidden, grad_weight, grad_up, grad_down


@_backward.register_fake
def _(grad, hidden, token, weight, up, down, before, order, counts, activation, gated, needs):
    made = zip((hidden, weight, up, down), needs, strict=True)
    return tuple(torch.empty_like(x) if needed else x.new_empty(0) for x, needed in made)


def has_kernels(hidden: Tensor) -> bool:
    """Whether the kernels of `ops.triton.training` compute this; the loop below runs anywhere."""
    return hidden.is_cuda and hidden.dtype != torch.float64 and triton.available()


def _pad(hidden: Tensor) -> int:
    return PAD if hidden.dtype.itemsize == 2 and hidden.device.type == "cpu" else 1


def _with_slack(values: Tensor, slack: int) -> Tensor:
    """`values` [N] and the last one `slack` times more, for the window of the last expert."""
    return torch.cat([values, values[-1:].expand(slack)]) if len(values) else values


def _groups(counts: Tensor, pad: int) -> Iterator[tuple[int, int, int, int]]:
    """Of every expert that has rows: its number, their begin and end, and the end of whole pads."""
    begin = 0
    for e, count in enumerate(counts.tolist()):
        if count:
            yield e, begin, begin + count, begin - (-count // pad) * pad
        begin += count


def _sum_by_token(
    rows: Tensor, order: Tensor, token: Tensor, num_tokens: int, weight: Tensor | None
) -> Tensor:
    """Sum `rows` [N + slack, D], in the order of the experts, by token: [T, D].

    One pass that reads every row once and writes every token once; adding rows to the output one
    after another would go through it K times.
    """
    place = torch.empty_like(order).index_copy(
        0, order, torch.arange(len(order), device=order.device)
    )
    by_token = torch.argsort(token, stable=True)
    ends = torch.bincount(token, minlength=num_tokens).cumsum(0)
    return F.embedding_bag(
        place[by_token],
        rows,
        torch.cat([ends.new_zeros(1), ends]),
        mode="sum",
        per_sample_weights=None if weight is None else weight[by_token],
        include_last_offset=True,
    )
