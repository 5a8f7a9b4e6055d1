"""Experts composed of two half-experts, never written out (Monet, arXiv 2412.04139).

Shapes: T tokens, D width, H heads, F expert width, sets of n1 and n2 half-experts, E = n1 * n2
experts; expert i * n2 + j is made of half-experts i and j. G [T, n1, n2] are the weights of the
composed experts.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moekit.core.errors import UserError
from moekit.core.registry import register

from ..routers.product_keys import FIRST, SECOND, set_sizes
from ..routing import Pairs, Routing


class Composition(Protocol):
    """Weights G, as the four sums that composed experts need of them."""

    def first(self) -> Tensor:
        """G summed over the second set: [T, n1]."""

    def second(self) -> Tensor:
        """G summed over the first set: [T, n2]."""

    def over_first(self, values: Tensor) -> Tensor:
        """sum_i G_ij values_i: [T, n1, F] to [T, n2, F]."""

    def over_second(self, values: Tensor) -> Tensor:
        """sum_j G_ij values_j: [T, n2, F] to [T, n1, F]."""


class FactoredComposition:
    """G = sum over heads of gates [T, H, n1] times gates [T, H, n2], through the heads."""

    def __init__(self, one: Tensor, two: Tensor) -> None:
        self.one, self.two = one, two

    def first(self) -> Tensor:
        return self.one.sum(1)  # the other set's gates sum to 1

    def second(self) -> Tensor:
        return self.two.sum(1)

    def over_first(self, values: Tensor) -> Tensor:
        return self.two.transpose(1, 2) @ (self.one @ values)

    def over_second(self, values: Tensor) -> Tensor:
        return self.one.transpose(1, 2) @ (self.two @ values)


class ListedComposition:
    """G as a list of pairs: what a choice of single experts, or a mask over them, leaves."""

    def __init__(self, pairs: Pairs, tokens: int, sizes: tuple[int, int], dtype) -> None:
        self.tokens, self.sizes = tokens, sizes
        self.token, self.weight = pairs.token, pairs.weight.to(dtype)
        self.i, self.j = pairs.expert // sizes[1], pairs.expert % sizes[1]

    def first(self) -> Tensor:
        return self._sum(self.i, self.sizes[0], self.weight)

    def second(self) -> Tensor:
        return self._sum(self.j, self.sizes[1], self.weight)

    def over_first(self, values: Tensor) -> Tensor:
        return self._sum(self.j, self.sizes[1], values[self.token, self.i] * self.weight[:, None])

    def over_second(self, values: Tensor) -> Tensor:
        return self._sum(self.i, self.sizes[0], values[self.token, self.j] * self.weight[:, None])

    def _sum(self, half: Tensor, size: int, values: Tensor) -> Tensor:
        flat = values.new_zeros(self.tokens * size, *values.shape[1:])
        flat = flat.index_add(0, self.token * size + half, values)
        return flat.unflatten(0, (self.tokens, size))


class ComposedExperts(nn.Module):
    """A bank of `count` composed experts, computed from the gates of a product-key router.

    With another router's routing, or an explicit one, it computes the pairs that are listed.
    """

    def __init__(self, count: int, first: int | None) -> None:
        super().__init__()
        self.num_experts = count
        self.sizes = set_sizes(count, first)

    def combine(self, hidden: Tensor, composition: Composition) -> Tensor:
        """The weighted sum of all composed experts on `hidden` [T, D]."""
        raise NotImplementedError

    def run_routing(self, hidden: Tensor, routing: Routing) -> Tensor:
        """`hidden` [T, D] by the gates in `routing.extra`, by the pairs where there are none."""
        if FIRST not in routing.extra:
            return self(hidden, routing.pairs)
        gates = [routing.extra[name].to(hidden.dtype) for name in (FIRST, SECOND)]
        if tuple(gate.shape[-1] for gate in gates) != self.sizes:
            raise UserError(
                f"the router's sets have {[gate.shape[-1] for gate in gates]} half-experts, those "
                f"of the experts {list(self.sizes)}; give both the same option first"
            )
        return self.combine(hidden, FactoredComposition(*gates)).to(hidden.dtype)

    def forward(self, hidden: Tensor, pairs: Pairs) -> Tensor:
        """Sum over pairs of weight * expert(hidden[token]): [T, D]."""
        listed = ListedComposition(pairs, len(hidden), self.sizes, hidden.dtype)
        return self.combine(hidden, listed).to(hidden.dtype)


def _initialise(module: nn.Module, std: float) -> None:
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:
            nn.init.normal_(parameter, std=std)


def _relu2(values: Tensor) -> Tensor:
    return F.relu(values).square()


def _project(values: Tensor, weight: Tensor) -> Tensor:
    """Sum over half-experts of weight_i values_i: [T, n, F] and [n, O, F] to [T, O]."""
    return values.flatten(1) @ weight.transpose(1, 2).flatten(0, 1)


def _hidden(hidden: Tensor, weight: Tensor) -> Tensor:
    """Every half-expert's product: [T, D] and [n, F, D] to [T, n, F]."""
    return F.linear(hidden, weight.flatten(0, 1)).unflatten(-1, weight.shape[:2])


@register(
    "expert",
    "monet-horizontal",
    title="Experts V_j relu2(U_i x + a_i) + b_j, one for every pair (i, j)",
    paper="Monet, arXiv:2412.04139",
    needs=("training",),
    limits="The only bank of its pool; computes all half-experts of every token.",
    options={
        "expert_width": "width F between the two products",
        "first": "half-experts of the first set; None: about the square root of the experts",
    },
)
class HorizontalExperts(ComposedExperts):
    """`up` [n1, F, D] and `up_bias` [n1, F]; `down` [n2, D, F] and `down_bias` [n2, D]."""

    def __init__(
        self, width: int, count: int, *, expert_width: int, first: int | None = None
    ) -> None:
        super().__init__(count, first)
        one, two = self.sizes
        self.cost = 2 * width * expert_width
        self.up = nn.Parameter(torch.empty(one, expert_width, width))
        self.up_bias = nn.Parameter(torch.empty(one, expert_width))
        self.down = nn.Parameter(torch.empty(two, width, expert_width))
        self.down_bias = nn.Parameter(torch.empty(two, width))
        self.init_weights_with(0.02)

    def init_weights_with(self, std: float) -> None:
        _initialise(self, std)

    def combine(self, hidden: Tensor, composition: Composition) -> Tensor:
        middle = _relu2(_hidden(hidden, self.up) + self.up_bias)
        out = _project(composition.over_first(middle), self.down)
        return out + composition.second() @ self.down_bias

    def run_one(self, expert: int, rows: Tensor) -> Tensor:
        i, j = divmod(expert, self.sizes[1])
        middle = _relu2(F.linear(rows, self.up[i], self.up_bias[i]))
        return F.linear(middle, self.down[j], self.down_bias[j])


@register(
    "expert",
    "monet-vertical",
    title="Experts of which half-experts i and j each make half of the hidden and output values",
    paper="Monet, arXiv:2412.04139",
    needs=("training",),
    limits="The only bank of its pool; computes all half-experts of every token.",
    options={
        "expert_width": "width F between the two products, half from each half-expert",
        "first": "half-experts of the first set; None: about the square root of the experts",
    },
)
class VerticalExperts(ComposedExperts):
    """Hidden values h_i = relu2(up_first_i x), k_j = relu2(up_second_j x); the output's upper half
    own_first_i h_i + cross_first_i k_j + bias_i, its lower cross_second_j h_i + own_second_j k_j +
    bias_j. `up_*` [n, F/2, D], the others [n, D/2, F/2], biases [n, D/2].
    """

    up_first: nn.Parameter
    own_first: nn.Parameter
    cross_first: nn.Parameter
    first_bias: nn.Parameter
    up_second: nn.Parameter
    own_second: nn.Parameter
    cross_second: nn.Parameter
    second_bias: nn.Parameter

    def __init__(
        self, width: int, count: int, *, expert_width: int, first: int | None = None
    ) -> None:
        super().__init__(count, first)
        self.cost = 2 * width * expert_width
        half, out = expert_width // 2, width // 2
        for name, size in zip(("first", "second"), self.sizes, strict=True):
            self.register_parameter(f"up_{name}", nn.Parameter(torch.empty(size, half, width)))
            self.register_parameter(f"own_{name}", nn.Parameter(torch.empty(size, out, half)))
            self.register_parameter(f"cross_{name}", nn.Parameter(torch.empty(size, out, half)))
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.empty(size, out)))
        self.init_weights_with(0.02)

    def init_weights_with(self, std: float) -> None:
        _initialise(self, std)

    def combine(self, hidden: Tensor, composition: Composition) -> Tensor:
        one = _relu2(_hidden(hidden, self.up_first))
        two = _relu2(_hidden(hidden, self.up_second))
        first, second = composition.first(), composition.second()
        upper = _project(one * first[..., None], self.own_first) + first @ self.first_bias
        upper = upper + _project(composition.over_second(two), self.cross_first)
        lower = _project(two * second[..., None], self.own_second) + second @ self.second_bias
        lower = lower + _project(composition.over_first(one), self.cross_second)
        return torch.cat([upper, lower], -1)

    def run_one(self, expert: int, rows: Tensor) -> Tensor:
        i, j = divmod(expert, self.sizes[1])
        one = _relu2(F.linear(rows, self.up_first[i]))
        two = _relu2(F.linear(rows, self.up_second[j]))
        upper = F.linear(one, self.own_first[i], self.first_bias[i])
        upper = upper + F.linear(two, self.cross_first[i])
        lower = F.linear(two, self.own_second[j], self.second_bias[j])
        lower = lower + F.linear(one, self.cross_second[j])
        return torch.cat([upper, lower], -1)
