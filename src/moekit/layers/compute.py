"""How banks of equal experts are computed: sorted by expert, in grouped matrix products.

Shapes: T tokens, D width, F expert width, E experts, N pairs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .routing import Pairs

# Rows [N, D] sorted by expert and the exclusive end of every expert's rows, int32 [E], to [N, D].
RunRows = Callable[[Tensor, Tensor], Tensor]


def run_sorted(hidden: Tensor, pairs: Pairs, num_experts: int, run: RunRows) -> Tensor:
    """Sum over pairs of weight * expert(hidden[token]): [T, D] in the dtype of `hidden`.

    `run` computes the rows of all experts at once; there may be none.
    """
    order = torch.argsort(pairs.expert, stable=True)
    token = pairs.token[order]
    counts = torch.bincount(pairs.expert, minlength=num_experts)
    rows = run(hidden[token], counts.cumsum(0).to(torch.int32))
    weighted = rows * pairs.weight[order].to(rows.dtype).unsqueeze(-1)
    out = torch.zeros_like(hidden, dtype=rows.dtype).index_add(0, token, weighted)
    return out.to(hidden.dtype)


def grouped_linear(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows [N, D] sorted by expert times the matrix [E, F, D] of their expert: [N, F].

    Under autocast in its dtype, which `torch.nn.functional.grouped_mm` does not do by itself.
    """
    kind = rows.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    return F.grouped_mm(rows.to(dtype), weight.to(dtype).transpose(1, 2), offs=ends)
