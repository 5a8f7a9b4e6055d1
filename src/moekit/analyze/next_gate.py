"""How well the next layer's own router predicts its experts one layer early."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from moekit.analyze.rerun import rerun
from moekit.analyze.result import Result
from moekit.core.collect import Batch
from moekit.core.errors import UserError
from moekit.core.port import SeamCall
from moekit.core.registry import register
from moekit.core.trace import RoutingTrace
from moekit.core.view import MoEView


class NextGate:
    """A sink that asks every router about the input of the layer before it.

    `hits` [L - 1, W] counts the chosen experts among the top_k + w that it finds likeliest, for
    w from 0 to `widen`; `chosen` [L - 1] counts the choices.
    """

    def __init__(self, widen: int = 4):
        self.widen = widen

    def start(self, view: MoEView) -> None:
        self.hits = np.zeros((max(len(view) - 1, 0), self.widen + 1), dtype=np.int64)
        self.chosen = np.zeros(len(self.hits), dtype=np.int64)
        self._before: dict[int, Tensor] = {}

    def batch(self, batch: Batch) -> None:
        self._before.clear()

    def layer(self, call: SeamCall) -> None:
        position = call.layer.position
        before = self._before.pop(position - 1, None)
        if call.router_input is None:
            return
        if before is not None and before.shape == call.router_input.shape:
            self._compare(call, before)
        self._before[position] = call.router_input.detach().clone()

    def end_batch(self) -> None:
        self._before.clear()

    def close(self) -> None: ...

    def _compare(self, call: SeamCall, before: Tensor) -> None:
        layer, row = call.layer, call.layer.position - 1
        guess = layer.route(before, **call.context)
        kept = call.tokens.mask
        real = call.ids >= 0
        if kept is not None:
            real = real & kept[:, None].to(real.device)
        self.chosen[row] += int(real.sum())
        for extra in range(self.widen + 1):
            likeliest = _likeliest(guess.ids, guess.logits, layer.num_choices, extra)
            found = (call.ids[:, :, None] == likeliest[:, None, :]).any(-1) & real
            self.hits[row, extra] += int(found.sum())


def _likeliest(ids: Tensor, logits: Tensor | None, num_choices: int, extra: int) -> Tensor:
    """The ids [T, K] that the rule itself chooses and the `extra` best logits after them."""
    if not extra or logits is None:
        return ids
    rest = logits.float().scatter(1, ids, float("-inf"))
    more = rest.topk(min(extra, num_choices - ids.shape[1]), dim=1).indices
    return torch.cat([ids, more], dim=1)


@register(
    "measure",
    "next-gate",
    title="Recall of the next layer's experts by its own router on this layer's input",
    paper="Fate 2502.12224",
    needs=("trace", "weights"),
    options={
        "widen": "experts guessed beyond the top k",
        "max_tokens": "tokens of the trace to run again, in whole samples spread evenly",
    },
)
def next_gate(
    trace: RoutingTrace, view: MoEView, *, widen: int = 4, max_tokens: int = 4096
) -> Result:
    """Run the model on the trace's tokens and let every router look one layer ahead.

    `+w` is the share of a token's experts among the K + w guessed. The prediction is exact where a
    layer adds nothing to the residual stream. Raises UserError for one MoE layer or a trace without
    token ids.
    """
    if len(view) < 2:
        raise UserError("the model has one MoE layer: there is no next layer to predict")
    sink = NextGate(widen)
    tokens = rerun(trace, view, [sink], max_tokens)
    recall = sink.hits / np.maximum(sink.chosen, 1)[:, None]
    return Result(
        ("layer", "next", *(f"+{w}" for w in range(widen + 1))),
        [
            (view[i].index, view[i + 1].index, *map(float, recall[i]))
            for i in range(len(recall))
            if sink.chosen[i]
        ],
        {"tokens": tokens, "recall": float(np.mean(recall[sink.chosen > 0, 0]))},
    )
