"""The expert FFN as two grouped matrix products, for training and prefill.

Letters: T tokens, K chosen experts, E experts, D width, F expert width, N = T*K pairs,
R = N plus padding rows.

Every expert's rows are padded to a multiple of `PAD`. oneDNN builds (and caches) one kernel per
matrix shape: with raw row counts almost every product is a new shape and building kernels costs
more than the products themselves; with padded counts the few dozen shapes stay cached.
Dispatch and combine are gathers in both directions, forward and backward, because the index
arithmetic knows the inverse permutation; autograd would scatter with atomics instead.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moekit.core.registry import register

PAD = 32
# The name under which transformers and the view find it.
GROUPED = "moekit_grouped"


@dataclass(frozen=True)
class Dispatch:
    """Where each (token, choice) pair lives among the padded rows.

    `row_of_pair` [N] gives the padded row of every pair, `token_of_row` [R] the token of every
    row (T for a padding row), `pair_of_row` [R] its pair (N for padding), and `ends` [E] the
    exclusive end of every expert's rows, as int32.
    """

    row_of_pair: Tensor
    token_of_row: Tensor
    pair_of_row: Tensor
    ends: Tensor


def dispatch_plan(topk_ids: Tensor, num_experts: int, pad: int = PAD) -> Dispatch:
    """Sort the pairs of `topk_ids` [T, K] by expert and lay them out in padded groups.

    R is T*K + E*(pad-1) rounded up, whatever the routing, so that shapes stay static.
    """
    num_pairs, top_k = topk_ids.numel(), topk_ids.shape[1]
    flat = topk_ids.reshape(-1)
    expert_of_sorted, pair_of_sorted = torch.sort(flat, stable=True)
    counts = torch.zeros(num_experts, dtype=torch.int64, device=flat.device)
    counts = counts.scatter_add(0, flat, torch.ones_like(flat))
    padded = (counts + pad - 1) // pad * pad
    ends = padded.cumsum(0)
    shift = (ends - padded) - (counts.cumsum(0) - counts)
    row_of_sorted = torch.arange(num_pairs, device=flat.device) + shift[expert_of_sorted]
    num_rows = -(-(num_pairs + num_experts * (pad - 1)) // pad) * pad
    pair_of_row = torch.full((num_rows,), num_pairs, dtype=torch.int64, device=flat.device)
    pair_of_row = pair_of_row.index_copy(0, row_of_sorted, pair_of_sorted)
    row_of_pair = torch.empty_like(flat).index_copy(0, pair_of_sorted, row_of_sorted)
    return Dispatch(row_of_pair, pair_of_row // top_k, pair_of_row, ends.to(torch.int32))


class _Gather(torch.autograd.Function):
    """Rows of `hidden` [T, D] in expert order [R, D]; padding rows are zero."""

    @staticmethod
    def forward(ctx, hidden: Tensor, token_of_row: Tensor, row_of_pair: Tensor) -> Tensor:
        ctx.save_for_backward(row_of_pair)
        ctx.num_tokens = hidden.shape[0]
        return torch.cat([hidden, hidden.new_zeros(1, hidden.shape[1])])[token_of_row]

    @staticmethod
    def backward(ctx, grad_rows: Tensor):
        (row_of_pair,) = ctx.saved_tensors
        pairs = grad_rows[row_of_pair].view(ctx.num_tokens, -1, grad_rows.shape[1])
        return pairs.sum(1), None, None


class _Scatter(torch.autograd.Function):
    """Rows [R, D] back in pair order [N, D]; the gradient of a padding row is zero."""

    @staticmethod
    def forward(ctx, rows: Tensor, row_of_pair: Tensor, pair_of_row: Tensor) -> Tensor:
        ctx.save_for_backward(pair_of_row)
        return rows[row_of_pair]

    @staticmethod
    def backward(ctx, grad_pairs: Tensor):
        (pair_of_row,) = ctx.saved_tensors
        zero = grad_pairs.new_zeros(1, grad_pairs.shape[1])
        return torch.cat([grad_pairs, zero])[pair_of_row], None, None


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of `gate_up` [..., 2F], the gate first: [..., F]."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def grouped_experts(
    hidden: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    activation: Callable[[Tensor], Tensor] = swiglu,
) -> Tensor:
    """Gated experts over `hidden` [T, D] with banks `gate_up` [E, 2F, D] and `down` [E, D, F].

    `activation` turns [R, 2F] into [R, F]. Returns [T, D] in the dtype of `hidden`. Under autocast
    the products run in its dtype, which `torch.nn.functional.grouped_mm` does not do by itself.
    """
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else gate_up.dtype
    num_tokens, top_k = topk_ids.shape
    plan = dispatch_plan(topk_ids, gate_up.shape[0])
    rows = _Gather.apply(hidden.to(dtype), plan.token_of_row, plan.row_of_pair)
    wide = F.grouped_mm(rows, gate_up.to(dtype).transpose(1, 2), offs=plan.ends)
    rows = F.grouped_mm(activation(wide), down.to(dtype).transpose(1, 2), offs=plan.ends)
    pairs = _Scatter.apply(rows, plan.row_of_pair, plan.pair_of_row)
    weighted = pairs.view(num_tokens, top_k, -1) * topk_weights.to(dtype).unsqueeze(-1)
    return weighted.sum(1).to(hidden.dtype)


@register(
    "backend",
    GROUPED,
    title="Two grouped matrix products a layer, rows padded so that CPU kernels are reused",
    limits="Gated, concatenated banks without biases, not transposed.",
)
def grouped_backend(experts: Any, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
    """`grouped_experts` on the banks of an experts module that `has_plain_banks`."""
    return grouped_experts(
        hidden,
        topk_ids,
        topk_weights,
        experts.gate_up_proj,
        experts.down_proj,
        experts._apply_gate,
    )


def has_plain_banks(experts: Any) -> bool:
    """Whether an experts module keeps what `grouped_backend` computes with."""
    return bool(
        getattr(experts, "has_gate", False)
        and getattr(experts, "is_concatenated", False)
        and not getattr(experts, "has_bias", True)
        and not getattr(experts, "is_transposed", True)
    )
