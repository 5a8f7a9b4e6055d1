"""A router whose state flows from layer to layer (RMoE, arXiv:2408.06793).

Letters: T tokens, E experts, D width, Q width of the state.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moekit.core.registry import register

from ..context import RouterContext
from ..names import one_of
from ..router import PipelineRouter
from ..select import TopK
from ..squash import softmax
from ..weigh import RenormalisedWeights

STATE = "rmoe"
RECURRENCES = ("full", "detached", "none")


class RecurrentScore(nn.Module):
    """Logits of a token's state [T, Q], which a GRU updates in every MoE layer.

    The projection [Q, D] of the token and the rows [E, Q] are the layer's own; all layers of a
    model share one GRU cell. Layers without experts leave the state as it is, and it lives for one
    token's pass over depth only: nothing is cached while decoding. `recurrence` "detached" cuts the
    gradient between layers and "none" starts every layer from zero: the paper's ablations, of the
    same parameter count.
    """

    def __init__(self, width: int, num_experts: int, state_width: int, recurrence: str) -> None:
        super().__init__()
        self.recurrence = recurrence
        self.projection = nn.Parameter(torch.empty(state_width, width))
        self.weight = nn.Parameter(torch.empty(num_experts, state_width))
        self.cell = GRU(state_width)
        for weight in (self.projection, self.weight):
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)

    def share(self, shared: nn.ModuleDict) -> None:
        """Use the GRU of the model's `shared` parts, where the first layer's is put."""
        if STATE not in shared:
            shared[STATE] = self.cell
        del self.cell
        # Not registered here: the parameters belong to the model and are saved once.
        self.__dict__["cell"] = shared[STATE]

    def forward(self, key: Tensor, context: RouterContext) -> Tensor:
        inputs = F.linear(key, self.projection.float())
        state = context.carry.get(STATE)
        if state is None or self.recurrence == "none":
            state = torch.zeros_like(inputs)
        elif self.recurrence == "detached":
            state = state.detach()
        state = self.cell(inputs, state)
        context.carry[STATE] = state
        return F.linear(state, self.weight.float())


class GRU(nn.Module):
    """One step of a gated recurrent unit in float32: input and state [T, Q] to state [T, Q]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight_in = nn.Parameter(torch.empty(3 * width, width))
        self.weight_state = nn.Parameter(torch.empty(3 * width, width))
        self.bias_in = nn.Parameter(torch.zeros(3 * width))
        self.bias_state = nn.Parameter(torch.zeros(3 * width))
        for weight in (self.weight_in, self.weight_state):
            nn.init.uniform_(weight, -(width**-0.5), width**-0.5)

    def forward(self, inputs: Tensor, state: Tensor) -> Tensor:
        # torch.gru_cell and not nn.GRUCell: a bfloat16 model must not round the state.
        weights = (self.weight_in, self.weight_state, self.bias_in, self.bias_state)
        return torch.gru_cell(inputs, state, *(weight.float() for weight in weights))


@register(
    "router",
    "rmoe",
    title="A GRU carries every token's routing state from layer to layer",
    paper="RMoE, arXiv:2408.06793",
    needs=("training",),
    options={
        "state_width": "width of the routing state",
        "recurrence": "full; detached: no gradient between layers; none: each layer from zero",
    },
)
def recurrent_router(
    width: int,
    num_experts: int,
    top_k: int,
    *,
    state_width: int = 128,
    recurrence: str = "full",
) -> nn.Module:
    """Top-k of a softmax over logits of the recurrent state, weights renormalised."""
    one_of("recurrence", recurrence, RECURRENCES)
    return PipelineRouter(
        num_experts,
        score=RecurrentScore(width, num_experts, state_width, recurrence),
        squash=softmax,
        select=TopK(top_k),
        weigh=RenormalisedWeights(),
    )
