"""`RouterContext`: what a router may know beside the hidden states.

Shapes: B sequences, S positions, T = B * S tokens in that order, Dk width of a key.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moekit.core import seeds

from .routing import Routing

# The entry of `carry` where a decoder layer leaves its attention weights [B, H, S, S] before its
# experts run, if its attention kernel hands them out ("eager" does).
ATTENTION = "attention"


@dataclass
class RouterContext:
    """Where a router stands: the batch, the layer, the step of training, and what came before.

    `batch` and `length` are B and S. `step`, `seed`, `layer` and `part` (which micro-batch of the
    step, over all processes) key every random draw. `token_mask` [T] is False for padding,
    `token_id` [T] the vocabulary's number, `token_type` [T] an integer (modality, document, task),
    `key` [T, Dk] what the router reads in place of the hidden state (a timestep's embedding),
    `position` [T] the place in the sequence. `cost` [E] is the work of the layer's experts and
    `round` counts the decisions of one layer; the layer sets both.

    `carry` is handed from layer to layer: a router puts there what the same router of a later layer
    reads (a recurrent state, logits), under its own name. `records` holds the routings so far.
    """

    batch: int
    length: int
    layer: int = 0
    step: int = 0
    seed: int = 0
    part: int = 0
    training: bool = False
    token_mask: Tensor | None = None
    token_id: Tensor | None = None
    token_type: Tensor | None = None
    key: Tensor | None = None
    position: Tensor | None = None
    cost: Tensor | None = None
    round: int = 0
    carry: dict[str, Any] = field(default_factory=dict)
    records: list[Routing] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return self.batch * self.length

    def enter(self, layer: int) -> RouterContext:
        """The context for `layer`: a copy, so that running a layer again finds what it found first.

        Activation recomputation repeats a layer's forward long after later layers have run; a
        shared `carry` or list of records would then hold their state.
        """
        return dataclasses.replace(
            self,
            layer=layer,
            carry=dict(self.carry),
            records=list(self.records),
            cost=None,
            round=0,
        )

    def generator(self, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
        """Random draws for `purpose`, the same whenever this layer runs in this micro-batch."""
        return self._generator(f"{purpose} of step {self.step} part {self.part}", device)

    def step_generator(self, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
        """As `generator`, but one draw for all micro-batches and processes of a step."""
        return self._generator(f"{purpose} of step {self.step}", device)

    def _generator(self, purpose: str, device: torch.device | str) -> torch.Generator:
        # The first round's draws are those of a layer of one round.
        purpose += f" round {self.round}" if self.round else ""
        return seeds.generator(self.seed, purpose, self.layer, str(device))
