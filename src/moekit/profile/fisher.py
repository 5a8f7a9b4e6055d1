"""The diagonal of the Fisher information of every expert's weights.

Shapes: E experts, F neurons, N numbers of a neuron (`core.neurons`), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from moekit.core.collect import Batch
from moekit.core.errors import UserError
from moekit.core.expert_weights import bank_views
from moekit.core.layer import MoELayer
from moekit.core.neurons import neuron_rows
from moekit.core.seeds import generator
from moekit.core.view import MoEView
from moekit.profile.collector import Sums
from moekit.profile.experts_run import runs_choices

FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")


def fisher_bytes(layer: MoELayer) -> int:
    """Bytes of the information of one layer, float32."""
    return 4 * sum(p.numel() for p in _banks(layer))


def add_fisher(
    view: MoEView,
    batches: Iterable[Batch | Tensor],
    positions: Sequence[int],
    sums: Sums,
    seed: int = 0,
) -> None:
    """Add `neuron_fisher` [E, F, N] and `fisher_sequences` of the layers at `positions` to `sums`.

    They are those of `fisher_diagonal`. Raises UserError for weights that are not in memory, and
    for families whose experts are no bank.
    """
    layers = [view[position] for position in positions]
    for layer in layers:
        if runs_choices(layer):
            raise UserError(
                f"{layer.name}: Fisher information is not available for "
                f"{type(layer).__name__}, whose experts are no bank of their own."
            )
    banks = [bank for layer in layers for bank in _banks(layer)]
    squares, count = fisher_diagonal(view.model, batches, banks, seed)
    for layer in layers:
        sums.add(layer.position, "neuron_fisher", _by_neuron(layer, squares))
        sums.add(layer.position, "fisher_sequences", torch.tensor(count))


def fisher_diagonal(
    model: nn.Module,
    batches: Iterable[Batch | Tensor],
    parameters: Sequence[nn.Parameter],
    seed: int = 0,
) -> tuple[dict[nn.Parameter, Tensor], int]:
    """The diagonal of the Fisher information of `parameters`, summed over sequences, and how many.

    F = sum over sequences of (gradient of log p(y | x))^2, entry by entry, with every token of y
    drawn from the model's own prediction at its place: the expectation over y is the diagonal of
    the Fisher information (2111.09832). One backward pass a sequence, so no products of different
    sequences get into the squares. float32, in the shapes of the parameters. Raises UserError for
    weights that are not in memory.
    """
    if any(parameter.is_meta for parameter in parameters):
        raise UserError("Fisher information needs the weights in memory; profile without --stream.")
    squares = {p: torch.zeros_like(p, dtype=torch.float32) for p in parameters}
    count = 0
    with _only_gradients_of(model, parameters):
        for ids, inputs in _sequences(model, batches):
            # logits_to_keep and caches do not matter here: every position is predicted.
            logits = model(input_ids=ids, use_cache=False, **inputs).logits[0].float()
            drawn = _draw(logits.detach(), seed, count)
            loss = functional.cross_entropy(logits, drawn, reduction="sum")
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    squares[parameter].add_(gradient.float().square())
            count += 1
    return squares, count


def _by_neuron(layer: MoELayer, squares: Mapping[nn.Parameter, Tensor]) -> Tensor:
    """The squares of a layer's banks [E, F, N], read as its weights are."""
    experts = layer.experts
    held = SimpleNamespace(
        **{flag: getattr(experts, flag) for flag in FLAGS if hasattr(experts, flag)},
        **{name: squares[bank] for name, bank in experts.named_parameters(recurse=False)},
    )
    return torch.stack([neuron_rows(bank_views(held, e)) for e in range(layer.num_experts)])


def _banks(layer: MoELayer) -> list[nn.Parameter]:
    return list(layer.experts.parameters(recurse=False))


def _draw(logits: Tensor, seed: int, sequence: int) -> Tensor:
    source = generator(seed, "fisher", sequence)
    return torch.multinomial(logits.softmax(-1).cpu(), 1, generator=source)[:, 0].to(logits.device)


def _sequences(
    model: nn.Module, batches: Iterable[Batch | Tensor]
) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """One sequence [1, S] at a time, without its padding."""
    device = next(model.parameters()).device
    for batch in batches:
        batch = Batch(batch) if isinstance(batch, Tensor) else batch
        for row, ids in enumerate(batch.ids):
            kept = ids if batch.mask is None else ids[batch.mask[row].bool()]
            inputs = {name: value[row : row + 1] for name, value in batch.inputs.items()}
            if len(kept):
                yield kept.unsqueeze(0).to(device), inputs


@contextmanager
def _only_gradients_of(model: nn.Module, banks: Sequence[nn.Parameter]) -> Iterator[None]:
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    training = model.training
    wanted = {id(bank) for bank in banks}
    try:
        model.eval()
        for parameter, _ in before:
            parameter.requires_grad_(id(parameter) in wanted)
        with torch.enable_grad():
            yield
    finally:
        model.train(training)
        for parameter, required in before:
            parameter.requires_grad_(required)
