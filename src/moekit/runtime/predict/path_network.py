"""A small network, trained on traces, that predicts the routing path (ExpertFlow).

Its state is the sum of an embedding of the token and of one for each expert that the token has
chosen so far; one hidden layer and a head a layer turn it into the experts of the layers to come.

Shapes: T tokens, K chosen, E experts, L layers, H width of the state, V token buckets.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce

from moekit.core.errors import UserError
from moekit.core.registry import register
from moekit.core.seeds import derive_seed
from moekit.core.trace import RoutingTrace
from moekit.runtime.predict.predictor import (
    REACH,
    Predictor,
    Scores,
    any_of,
    chosen_ids,
    multi_hot,
    shape_of,
)

BATCH = 512
RATE = 3e-3


class PathNetwork(nn.Module):
    """Logits [T, E] of the experts of a layer, given the state after an earlier one."""

    def __init__(self, num_layers: int, num_experts: int, buckets: int, width: int) -> None:
        super().__init__()
        # The last bucket is a token whose id is not known; the last expert is none.
        self.tokens = nn.Embedding(buckets + 1, width)
        self.experts = nn.Embedding(num_layers * num_experts + 1, width, padding_idx=-1)
        self.after = nn.Parameter(torch.zeros(num_layers + 1, width))
        self.inner = nn.Linear(width, width)
        self.heads = nn.Parameter(torch.randn(num_layers, num_experts, width) / width**0.5)
        self.bias = nn.Parameter(torch.zeros(num_layers, REACH, num_experts))

    def first(self, tokens: Tensor) -> Tensor:
        """The state [T, H] before the first layer."""
        buckets = self.tokens.num_embeddings - 1
        return self.tokens(torch.where(tokens < 0, buckets, tokens % buckets))

    def step(self, state: Tensor, layer: int, ids: Tensor) -> Tensor:
        """The state [T, H] once `layer` has chosen ids [T, K]."""
        none = self.experts.num_embeddings - 1
        rows = torch.where(ids < 0, none, layer * self.heads.shape[1] + ids)
        return state + self.experts(rows).sum(1)

    def hidden(self, state: Tensor, layer: int) -> Tensor:
        state = torch.relu(state + self.after[layer + 1])
        return state + torch.relu(self.inner(state))

    def forward(self, hidden: Tensor, layer: int, ahead: int) -> Tensor:
        target = layer + ahead
        return hidden @ self.heads[target].T + self.bias[target, ahead - 1]


@register(
    "predictor",
    "expertflow",
    title="A small network over token and path so far, trained on traces",
    paper="ExpertFlow 2410.17954",
    needs=("trace", "training"),
    lossless=True,
    limits="The paper's network reads the whole prompt at once with a T5; this one reads a token "
    "and its own path, so that it also serves decoding, and knows nothing of other tokens.",
    options={
        "width": "of the network's state",
        "epochs": "passes over the traces",
        "buckets": "rows of the token embedding; larger ids share them",
        "seed": "of the training",
    },
)
class LearnedPath(Predictor):
    """Predicts from a `PathNetwork`; also before the first layer, from the tokens alone."""

    learns = True

    def __init__(
        self, *, width: int = 128, epochs: int = 4, buckets: int = 2**15, seed: int = 0
    ) -> None:
        if min(width, epochs, buckets) < 1:
            raise UserError(f"width {width}, epochs {epochs} and buckets {buckets} must be above 0")
        self.width, self.epochs, self.buckets, self.seed = width, epochs, buckets, seed
        self.network: PathNetwork | None = None

    def fit(self, traces: Sequence[RoutingTrace]) -> None:
        """Train by Adam on the binary cross-entropy of every layer within reach of every other."""
        num_layers, num_experts, _ = shape_of(traces)
        largest = max(int(trace.tokens.max()) for trace in traces if len(trace))
        with torch.random.fork_rng():
            torch.manual_seed(derive_seed(self.seed, "path network"))
            buckets = max(1, min(self.buckets, largest + 1))
            network = PathNetwork(num_layers, num_experts, buckets, self.width)
        tokens = torch.cat([trace.tokens for trace in traces])
        paths = [
            torch.from_numpy(np.concatenate([chosen_ids(t, position, 0, len(t)) for t in traces]))
            for position in range(num_layers)
        ]
        optimiser = torch.optim.Adam(network.parameters(), lr=RATE)
        random = np.random.default_rng(derive_seed(self.seed, "path network order"))
        steps = self.epochs * -(-len(tokens) // BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps)
        for _ in range(self.epochs):
            order = torch.from_numpy(random.permutation(len(tokens)))
            for rows in order.split(BATCH):
                loss = _loss(network, tokens[rows], [path[rows] for path in paths])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
        self.network = network.eval()

    def state(self) -> dict[str, NDArray]:
        assert self.network is not None
        return {name: p.detach().numpy() for name, p in self.network.named_parameters()}

    def restore(self, state: dict[str, NDArray]) -> None:
        num_layers, num_experts, width = state["heads"].shape
        network = PathNetwork(num_layers, num_experts, len(state["tokens.weight"]) - 1, width)
        try:
            network.load_state_dict({name: torch.from_numpy(a) for name, a in state.items()})
        except RuntimeError as error:
            raise ValueError(str(error)) from None
        self.network = network.eval()

    def start(self, num_layers: int, num_experts: int, top_k: int) -> None:
        if self.network is None:
            raise UserError("expertflow is learned: fit the predictor to a trace of the model")
        super().start(num_layers, num_experts, top_k)
        self._check_shape(*self.network.heads.shape[:2])

    @torch.no_grad()
    def begin(self, tokens: ArrayLike | None = None) -> None:
        super().begin(tokens)
        assert self.network is not None
        known = torch.tensor([-1]) if self.tokens is None else torch.from_numpy(self.tokens)
        self._state = self.network.first(known)
        self._hidden: tuple[int, Tensor] | None = None

    @torch.no_grad()
    def observe(self, layer: int, ids: ArrayLike, hidden: ArrayLike | None = None) -> None:
        super().observe(layer, ids, hidden)
        assert self.network is not None
        self._state = self.network.step(self._state, layer, torch.from_numpy(self.chosen[layer]))

    @torch.no_grad()
    def predict(self, layer: int, ahead: int) -> Scores:
        assert self.network is not None
        if self._hidden is None or self._hidden[0] != layer:
            self._hidden = layer, self.network.hidden(self._state, layer)
        logits = self.network(self._hidden[1], layer, ahead)
        return any_of(logits.sigmoid().numpy())


def _loss(network: PathNetwork, tokens: Tensor, paths: list[Tensor]) -> Tensor:
    num_experts = network.heads.shape[1]
    wanted = [torch.from_numpy(multi_hot(ids.numpy(), num_experts)) for ids in paths]
    state = network.first(tokens)
    losses = []
    for layer in range(-1, len(paths) - 1):
        if layer >= 0:
            state = network.step(state, layer, paths[layer])
        hidden = network.hidden(state, layer)
        for ahead in range(1, min(REACH, len(paths) - 1 - layer) + 1):
            losses.append(bce(network(hidden, layer, ahead), wanted[layer + ahead]))
    return torch.stack(losses).mean()
