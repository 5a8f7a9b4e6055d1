"""Routes of finitely many keys, computed once: the route is a table, and its experts fuse.

A router that reads only the key (a timestep, a noise level, a task) decides the same for all tokens
of a key. `RouteTable` keeps its decisions, by the key's number; `fuse` stacks the experts of one
decision into one dense FFN, as MoDE does (arXiv 2412.12953).

Shapes: T tokens, n keys, Dk width of a key, E experts, K chosen, D width, F expert width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moekit.core.errors import UserError

from .context import RouterContext
from .experts.ffn import SwiGLUExperts
from .router import Choice, to_tokens
from .routing import Routing


class FusedFFN(NamedTuple):
    """A dense SwiGLU: `gate_up` [2 * K * F, D], the gate first, and `down` [D, K * F]."""

    gate_up: Tensor
    down: Tensor

    def __call__(self, hidden: Tensor) -> Tensor:
        gate, up = F.linear(hidden, self.gate_up).chunk(2, -1)
        return F.linear(F.silu(gate) * up, self.down)


class RouteTable(nn.Module):
    """A router whose decisions were made beforehand: key number `context.token_type` decides.

    By number and never by the key's value: nearly equal keys must not collide.
    """

    causal = True
    sees_batch = False

    def __init__(self, routing: Routing) -> None:
        super().__init__()
        self.routing = routing

    @property
    def num_keys(self) -> int:
        return self.routing.num_tokens

    def forward(self, hidden: Tensor, context: RouterContext) -> Routing:
        """The routing of T tokens; UserError for a key number that the table does not have."""
        index = context.token_type
        if index is None:
            raise UserError("a table of routes needs token_type, the number of each token's key")
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < self.num_keys:
            raise UserError(
                f"key numbers from {int(index.min())} to {int(index.max())} do not all lie in the "
                f"table of {self.num_keys} keys"
            )
        table = self.routing
        choice = Choice(table.token, table.expert, table.top_k)
        (token, expert, top_k), weight = to_tokens(choice, table.weight, index, self.num_keys)
        return replace(
            table,
            token=token,
            expert=expert,
            weight=weight,
            top_k=top_k,
            num_tokens=len(index),
            unit_of_token=index,
            token_mask=context.token_mask,
            cost=context.cost,
            layer=context.layer,
        )

    def after_step(self, counts: Tensor) -> None:
        """Nothing moves."""

    def fuse(self, bank: SwiGLUExperts, key: int) -> FusedFFN:
        """The experts of `bank` that key number `key` chose as one dense FFN, exactly.

        Up-projections are stacked, down-projections stand side by side with the weights in them.
        Raises UserError for experts of another type.
        """
        if type(bank) is not SwiGLUExperts:
            raise UserError(f"experts of type {type(bank).__name__} do not fuse; swiglu ones do")
        own = self.routing.token == key
        expert, weight = self.routing.expert[own], self.routing.weight[own]
        gate, up = bank.gate_up_proj[expert].chunk(2, 1)
        gate_up = torch.cat([gate.flatten(0, 1), up.flatten(0, 1)])
        down = bank.down_proj[expert] * weight.to(bank.down_proj.dtype)[:, None, None]
        return FusedFFN(gate_up, down.transpose(0, 1).flatten(1))


@torch.no_grad()
def precompute(router: nn.Module, keys: Tensor) -> RouteTable:
    """The decisions of `router` for `keys` [n, Dk], as at inference.

    UserError for a router that reads more than each key by itself.
    """
    if not router.causal or router.sees_batch or getattr(router, "units", None) is not None:
        raise UserError("only a router that decides key by key has a table of routes")
    context = RouterContext(len(keys), 1, key=keys)
    return RouteTable(router(keys, context))
