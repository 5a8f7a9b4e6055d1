"""A short training of some parameters of an upcycled model, the others frozen.

For what a method cannot do without; a long one is `moekit train`'s business. Shapes: N windows, S
tokens a window, T tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from moekit.core.deferred import Deferred
from moekit.core.errors import UserError
from moekit.core.seeds import generator
from moekit.upcycle.ffn import constant

WARM_UP = 0.1
CLIP = 1.0


def batches_of(windows: Tensor, size: int, seed: int) -> Iterator[Tensor]:
    """Batches [size, S] without end, every pass in an order of its own."""
    for turn in itertools.count():
        order = torch.randperm(len(windows), generator=generator(seed, "order of windows", turn))
        yield from windows[order].split(size)


def train_parts(
    parameters: Sequence[nn.Parameter],
    loss_of: Callable[[Tensor], Tensor],
    batches: Iterator[Tensor],
    steps: int,
    learning_rate: float,
) -> list[float]:
    """`steps` steps of AdamW on `loss_of(batch)`; the losses. The rate warms up and falls to 0."""
    if not parameters:
        raise UserError("there is nothing to train in this model.")
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    warm = max(1, round(WARM_UP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (steps - step) / max(1, steps - warm))
    )
    losses = []
    for batch in itertools.islice(batches, steps):
        loss = loss_of(batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return losses


def next_token_loss(model: Any, batch: Tensor) -> Tensor:
    """Mean nats of the tokens of windows [N, S] after the first."""
    logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


def freeze(model: nn.Module) -> None:
    """No parameter of the model learns until `train_parts` is given it."""
    model.requires_grad_(False)


def trained(
    tensors: Mapping[str, Deferred], model: nn.Module, names: Sequence[str]
) -> dict[str, Deferred]:
    """The tensors with those of `names` as they are in `model` now, in the format they had."""
    state = model.state_dict()
    return {
        name: constant(state[name].detach().to(tensor.dtype)) if name in names else tensor
        for name, tensor in tensors.items()
    }
