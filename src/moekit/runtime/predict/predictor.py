"""What a predictor of experts is: it watches a forward pass and says which experts come next.

It sees routing, token ids and, for those that ask, the input of the routers; it decides nothing. A
wrong prediction costs a read and never changes a result, so all of them are lossless.

Shapes: T tokens of one forward pass (of any number of sequences), D width, K chosen, E experts,
L MoE layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moekit.core.errors import UserError
from moekit.core.trace import RoutingTrace

# Layers that a prediction looks ahead at most, as in Fate and HybriMoE.
REACH = 3

Scores = NDArray[np.float32]


class Predictor:
    """One way to predict experts; subclasses say how.

    In use: `start` for a model, then for every forward pass `begin`, and after every router
    `observe` and as many `predict` or `predict_all` as wanted. One that `learns` predicts after
    `fit`, or after `restore` of the state of one that was fitted.
    """

    learns = False
    reads_hidden = False

    def start(self, num_layers: int, num_experts: int, top_k: int) -> None:
        """Forget what was observed, for the maxima over the layers of a model.

        Raises UserError for a predictor that has not learned, or learned on another shape.
        """
        self.num_layers, self.num_experts, self.top_k = num_layers, num_experts, top_k
        self.begin()

    def begin(self, tokens: ArrayLike | None = None) -> None:
        """A forward pass over `tokens` [T] begins; None where their ids are not known."""
        self.tokens = None if tokens is None else np.asarray(tokens, dtype=np.int64).reshape(-1)
        self.chosen: dict[int, NDArray[np.int64]] = {}

    def observe(self, layer: int, ids: ArrayLike, hidden: ArrayLike | None = None) -> None:
        """The router of `layer` chose `ids` [T, K] (-1: none) on its input `hidden` [T, D]."""
        self.chosen[layer] = np.asarray(ids, dtype=np.int64)

    def predict(self, layer: int, ahead: int) -> Scores:
        """How likely each expert [E] of layer `layer` + `ahead` is used by a token of this pass.

        `layer` is the last one observed, or -1 before the first. Between 0 and 1, and only their
        order is meant: `calibration` turns them into probabilities.
        """
        raise NotImplementedError

    def predict_all(self, layer: int, aheads: Sequence[int]) -> Scores:
        """`predict` for each of A `aheads`, [A, E]."""
        return np.stack([self.predict(layer, ahead) for ahead in aheads])

    def fit(self, traces: Sequence[RoutingTrace]) -> None:
        """Learn from traces of the model; where there is nothing to learn, do nothing."""

    def state(self) -> dict[str, NDArray]:
        """What was learned, as arrays by name."""
        return {}

    def restore(self, state: dict[str, NDArray]) -> None:
        """Take over what `state` returned; KeyError or ValueError where it does not fit."""

    def _check_shape(self, num_layers: int, num_experts: int) -> None:
        """Raise UserError unless what was learned, by shape, is of the model that starts."""
        if (num_layers, num_experts) != (self.num_layers, self.num_experts):
            raise UserError(
                f"the predictor was fitted to {num_layers} layers of {num_experts} experts, the "
                f"model has {self.num_layers} of {self.num_experts}: fit it to a trace of this one"
            )


def any_of(per_token: NDArray) -> Scores:
    """The chance that at least one of T independent tokens uses an expert, [..., T, E] to
    [..., E]."""
    if per_token.shape[-2] == 1:
        return per_token[..., 0, :].astype(np.float32)
    return (1 - np.prod(1 - per_token, axis=-2)).astype(np.float32)


def shape_of(traces: Sequence[RoutingTrace]) -> tuple[int, int, int]:
    """Layers, experts and choices of the model that was traced; UserError without a token."""
    if not any(len(trace) for trace in traces):
        raise UserError("a predictor is fitted to routing: the traces have no tokens")
    layers = traces[0].layers
    return len(layers), max(n.num_experts for n in layers), max(n.top_k for n in layers)


def chosen_ids(trace: RoutingTrace, position: int, start: int, stop: int) -> NDArray[np.int64]:
    """The ids [t, K] of a layer; -1 for none and for choices that run no expert."""
    ids = trace.layer(position, start, stop).topk_ids.numpy()
    return np.where(ids < trace.layers[position].num_experts, ids, -1)


def multi_hot(ids: NDArray[np.int64], num_experts: int) -> NDArray[np.float32]:
    """1 where a token chose the expert, [T, E]."""
    hot = np.zeros((len(ids), num_experts + 1), dtype=np.float32)
    hot[np.arange(len(ids))[:, None], np.where(ids < 0, num_experts, ids)] = 1
    return hot[:, :num_experts]
