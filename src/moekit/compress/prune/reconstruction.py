"""How far a layer's routed output moves when only some of its experts are left.

Every expert runs once on every token; after that a set of experts costs one run of the routing rule
and a quadratic form, since the output is a weighted sum: with a the change of a token's weights [C]
and G the products of its experts' outputs [C, C], the squared change of the output is a' G a.

Shapes: T tokens, C choices of a layer, E experts, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moekit.core.collect import Batch, Sink, collect
from moekit.core.errors import UserError
from moekit.core.layer import MoELayer
from moekit.core.port import SeamCall
from moekit.core.routing_rule import Routing
from moekit.core.spec import spec_of
from moekit.core.view import MoEView
from moekit.profile.experts_run import everyone, rows_at_once, runs_choices

# All experts' outputs of so many bytes are held at once while the products are taken.
PIECE_BYTES = 64 << 20


@dataclass
class _Forward:
    """One forward of the layer; `rows` are its tokens that are no padding."""

    logits: Tensor
    hidden: Tensor
    context: dict[str, Any]
    rows: Tensor | slice
    weights: Tensor
    products: Tensor


class Reconstruction:
    """The distance between a layer's routed output and that of a part of its experts.

    `error` sums the Frobenius norms of the difference over the forwards that were added, which is
    NAEE's objective (2402.14800). Holds T * C * C numbers. Raises UserError for layers whose output
    is no weighted sum of experts, or whose router has no logits.
    """

    def __init__(self, view: MoEView, layer: MoELayer) -> None:
        spec = spec_of(cast(PreTrainedModel, view.model)).per_layer[layer.position]
        if spec.scales_input or layer.router_weight is None:
            why = (
                "weighs the inputs of its experts" if spec.scales_input else "has no router matrix"
            )
            raise UserError(f"{layer.name} {why}, so sets of its experts cannot be compared.")
        self.layer = layer
        self._forwards: list[_Forward] = []

    def add(self, call: SeamCall) -> None:
        """Take in one call of the layer, which must carry logits."""
        assert call.logits is not None
        assert call.router_input is not None
        rows: Tensor | slice = slice(None) if call.mask is None else call.mask.bool()
        self._forwards.append(
            _Forward(
                call.logits,
                call.router_input,
                call.context,
                rows,
                self._dense(call.ids, call.weights)[rows],
                self._products(call.hidden[rows]),
            )
        )

    @torch.no_grad()
    def error(self, keep: Iterable[int]) -> float:
        """Sum over forwards of the norm of the output's change when only `keep` [r] are left."""
        gone = sorted(set(range(self.layer.num_experts)) - set(keep))
        total = 0.0
        for forward in self._forwards:
            routing = self._routed(forward, gone)
            change = forward.weights - self._dense(routing.ids, routing.weights)[forward.rows]
            squared = torch.einsum("tc,tcd,td->", change, forward.products, change)
            # Rounding may leave a tiny negative where nothing changed.
            total += float(squared.clamp(min=0).sqrt())
        return total

    def _routed(self, forward: _Forward, gone: list[int]) -> Routing:
        return self.layer.route_from_logits(forward.logits, forward.hidden, gone, **forward.context)

    def _dense(self, ids: Tensor, weights: Tensor) -> Tensor:
        """Weights by choice [T, C] in float32, from ids and weights [T, K]; -1 chooses nothing."""
        dense = torch.zeros(len(ids), self.layer.num_choices + 1, device=ids.device)
        dense.scatter_add_(-1, ids.where(ids >= 0, self.layer.num_choices), weights.float())
        return dense[:, :-1]

    def _products(self, hidden: Tensor) -> Tensor:
        layer, choices = self.layer, self.layer.num_choices
        made = torch.zeros(len(hidden), choices, choices, device=hidden.device)
        step = max(1, PIECE_BYTES // (4 * choices * hidden.shape[1]))
        step = min(step, rows_at_once(layer, hidden))
        for start in range(0, len(hidden), step):
            piece = hidden[start : start + step]
            # Choices without an expert add nothing, but where the family says what they do.
            outputs = piece.new_zeros(len(piece), choices, hidden.shape[1], dtype=torch.float32)
            for rows in everyone(layer, piece):
                outputs[:, rows.expert] = rows.output.float()
            if runs_choices(layer):
                for choice in range(layer.num_experts, choices):
                    outputs[:, choice] = layer.run_expert(choice, piece).float()
            made[start : start + step] = outputs @ outputs.transpose(1, 2)
        return made


class _Into(Sink):
    """A sink that hands every call of one layer to a `Reconstruction`."""

    def __init__(self, target: Reconstruction) -> None:
        self._target = target

    def start(self, view: MoEView) -> None: ...

    def batch(self, batch: Batch) -> None: ...

    def layer(self, call: SeamCall) -> None:
        if call.layer.position == self._target.layer.position:
            self._target.add(call)

    def end_batch(self) -> None: ...

    def close(self) -> None: ...


@torch.no_grad()
def reconstruction_of(
    view: MoEView, batches: Sequence[Batch | Tensor], position: int
) -> Reconstruction:
    """Run the model once, as its contexts make it now, and take in the layer at `position`."""
    made = Reconstruction(view, view[position])
    collect(view, batches, [_Into(made)], logits=True)
    return made
