"""A model in memory whose tensors are weighted sums of stored ones, and what its loss says of the
weights.

The gradient by the weight of a stored tensor is its inner product with the gradient by the mixed
one, so nothing but the mixed model is ever differentiated. Shapes: M tensors, V stored models
(vertices, the base first), S tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from moekit.core.collect import by_length
from moekit.core.errors import UserError
from moekit.merge.job import TensorJob

# Stored tensors that are held in memory; beyond it they are read for every step.
HELD_BYTES = 1 << 30
LOSSES = ("entropy", "cross-entropy")


class Mixture:
    """`network` with tensors sum_v C[t, v] W[t, v] of the jobs' base and models."""

    def __init__(self, network: PreTrainedModel, jobs: Mapping[str, TensorJob]) -> None:
        self.network, self.names = network, list(jobs)
        self._vertices = [[job.base, *job.tensors] for job in jobs.values()]
        places = network.state_dict(keep_vars=True)
        missing = next((name for name in self.names if name not in places), None)
        if missing is not None:
            raise UserError(f"{missing} is no parameter of the model, so it cannot be learned.")
        self._places = [places[name] for name in self.names]
        self._held: dict[tuple[int, int], Tensor] = {}
        self._room = HELD_BYTES
        for place in self._places:
            place.requires_grad_(place.is_floating_point() and place.is_leaf)

    @property
    def shape(self) -> tuple[int, int]:
        """(M, V)."""
        return len(self.names), len(self._vertices[0])

    def set(self, weights: Tensor) -> None:
        """Make the network's tensors those of the weights [M, V]."""
        with torch.no_grad():
            for number, place in enumerate(self._places):
                total = torch.zeros(place.shape)
                for vertex, weight in enumerate(weights[number].tolist()):
                    if weight != 0:
                        total.add_(self._vertex(number, vertex), alpha=weight)
                place.copy_(total)

    def pull(self, cosine: bool = False) -> Tensor:
        """The gradient by the weights [M, V] of the losses so far, which are forgotten.

        With `cosine` divided by the norms of the gradient and of the stored tensor.
        """
        found = torch.zeros(self.shape, dtype=torch.float64)
        for number, place in enumerate(self._places):
            if place.grad is None:
                continue
            gradient = place.grad.flatten()
            for vertex in range(self.shape[1]):
                stored = self._vertex(number, vertex).flatten()
                value = float(torch.dot(gradient, stored))
                if cosine:
                    value /= max(float(gradient.norm() * stored.norm()), 1e-30)
                found[number, vertex] = value
            place.grad = None
        return found

    def add_loss(self, sequences: Sequence[Tensor], kind: str, share: float = 1.0) -> float:
        """Add the mean loss over sequences [1, S] times `share` to what `pull` is the gradient of.

        `kind` is "entropy" of the next token or "cross-entropy" with it. Returns the mean loss.
        """
        total = 0.0
        for batch in by_length(sequences):
            loss = token_loss(self.network, batch, kind) * (len(batch) / len(sequences))
            (loss * share).backward()
            total += float(loss.detach())
        return total

    def _vertex(self, number: int, vertex: int) -> Tensor:
        key = number, vertex
        if key in self._held:
            return self._held[key]
        source: Any = self._vertices[number][vertex]
        tensor: Tensor = (source.read() if hasattr(source, "read") else source).float()
        if tensor.nbytes <= self._room:
            self._held[key] = tensor
            self._room -= tensor.nbytes
        return tensor


def token_loss(network: PreTrainedModel, ids: Tensor, kind: str) -> Tensor:
    """Mean over tokens of ids [B, S] of the next token's entropy, or cross-entropy, in nats."""
    logits = network(input_ids=ids, use_cache=False).logits.float()
    if kind == "entropy":
        log = logits.log_softmax(-1)
        return -(log.exp() * log).sum(-1).mean()
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
