"""MoTE: ternary routed experts beside the dense block they grew from.

MoTE, arXiv 2506.14435; the rounding is BitNet b1.58's. The old feed-forward block stays as a frozen
shared expert in full precision, so that many more experts fit into the memory: three levels a
weight. Experts are trained with the rounding in the forward pass and none in the backward pass.

Shapes: T tokens, D width, F expert width, E experts.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from moekit.core.errors import UserError
from moekit.ops.straight_through import int8_rows, ternary_weight


class TernaryLinear(nn.Linear):
    """A linear layer whose weights are ternary and whose inputs are 8 bits in every forward."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(int8_rows(x), ternary_weight(self.weight), self.bias)


@dataclass
class MoTEOutput:
    """The output [..., D] and the balance loss of its routing (a scalar)."""

    hidden: Tensor
    balance: Tensor


class MoTE(nn.Module):
    """y = FFN(x) + p_i(x) * E_i(x), i the likeliest of E ternary experts by the router's softmax.

    `dense` maps [..., D] to [..., D] and is frozen; the experts begin as copies of it with every
    linear layer ternary. With `preserve` the layer after which nothing is added back (the last
    linear one of each expert) begins at zero, so that the model begins as it was; without, as in
    the paper, the experts add something from the start. Raises `UserError` for a block without
    linear layers.
    """

    def __init__(
        self, dense: nn.Module, width: int, num_experts: int = 4, *, preserve: bool = False
    ) -> None:
        super().__init__()
        self.shared = dense.requires_grad_(False)
        self.router = nn.Linear(width, num_experts, bias=False)
        self.experts = nn.ModuleList(_ternary_copy(dense, preserve) for _ in range(num_experts))

    def forward(self, x: Tensor) -> MoTEOutput:
        rows = x.reshape(-1, x.shape[-1])
        probabilities = self.router(rows).softmax(-1)
        gate, chosen = probabilities.max(-1)
        added = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            tokens = (chosen == e).nonzero().flatten()
            if len(tokens):
                added = added.index_add(0, tokens, gate[tokens, None] * expert(rows[tokens]))
        load = functional.one_hot(chosen, len(self.experts)).to(rows.dtype).mean(0)
        # Switch's loss: one where all experts get alike.
        balance = len(self.experts) * (load * probabilities.mean(0)).sum()
        return MoTEOutput(self.shared(x) + added.view_as(x), balance)


def _ternary_copy(dense: nn.Module, preserve: bool) -> nn.Module:
    expert = copy.deepcopy(dense).requires_grad_(True)
    linear = [(n, m) for n, m in expert.named_modules() if isinstance(m, nn.Linear)]
    if not linear:
        raise UserError(f"{type(dense).__name__} has no linear layers, so it has no ternary form.")
    for name, module in linear:
        made = TernaryLinear(module.in_features, module.out_features, module.bias is not None)
        made.load_state_dict(module.state_dict())
        parent, _, leaf = name.rpartition(".")
        setattr(expert.get_submodule(parent), leaf, made)
        last = made
    if preserve:
        nn.init.zeros_(last.weight)
    return expert
