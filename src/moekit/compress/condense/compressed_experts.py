"""Compressed Experts: a token's last choices as vectors that modulate its first ones.

Shapes: T tokens, K choices, E experts, D width, F expert width, A auxiliary choices (the A of least
weight); the other K - A run, modulated. (Compressed Experts 2503.00634.)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from moekit.compress.quantize.layer_experts import gated, output_of
from moekit.core.collect import Batch
from moekit.core.errors import UserError
from moekit.core.layer import MoELayer
from moekit.core.registry import register
from moekit.core.spec import spec_of
from moekit.core.view import MoEView
from moekit.profile.experts_run import runs_choices

FORMAT = "moekit.compressed-experts"
PARTS = ("gate", "middle", "up")


class CompressedExperts:
    """Three vectors an expert: of the gate's input [D], of the middle [F], of up's input [D].

    Ones at first, when a layer equals running only its main choices with their own weights. The
    published code keeps the middle's in the first F of D entries, which needs D >= F; here it has
    its own size. Raises UserError where `auxiliary` leaves no main choice, and for families whose
    experts cannot be run with other inputs.
    """

    def __init__(self, view: MoEView, auxiliary: int) -> None:
        model: Any = view.model
        for layer, spec in zip(view, spec_of(model).per_layer, strict=True):
            if not 1 <= auxiliary < layer.top_k:
                raise UserError(
                    f"{layer.name} runs {layer.top_k} experts a token, so 1 to {layer.top_k - 1} "
                    f"of them can be auxiliary, not {auxiliary}."
                )
            if runs_choices(layer) or spec.scales_input:
                raise UserError(
                    f"{layer.name}: {type(layer).__name__} runs its experts by code of its own, so "
                    "their inputs cannot be modulated."
                )
        self.view, self.auxiliary = view, auxiliary
        self.vectors = [
            {
                part: nn.Parameter(torch.ones(layer.num_experts, size))
                for part, size in _sizes(layer).items()
            }
            for layer in view
        ]

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [vector for layer in self.vectors for vector in layer.values()]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Let the model run its main choices, modulated by the vectors of the others."""
        with ExitStack() as stack:
            for layer in self.view:
                backend = partial(_run, layer, self.vectors[layer.position], self.auxiliary)
                stack.enter_context(self.view.use_backend(backend, layers=[layer.position]))
            yield

    def save(self, path: Path) -> None:
        """Write the vectors to one safetensors file."""
        header = {"format": FORMAT, "auxiliary": self.auxiliary}
        tensors = {
            f"{position}.{part}": vector.detach().cpu().contiguous()
            for position, layer in enumerate(self.vectors)
            for part, vector in layer.items()
        }
        save_file(tensors, path, metadata={"header": json.dumps(header)})

    @classmethod
    def load(cls, path: Path, view: MoEView) -> CompressedExperts:
        """Read the vectors for the model of `view`; UserError for a file of another model."""
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {}).get("header", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError) as error:
            raise UserError(f"{path} cannot be read: {error}") from None
        if header.get("format") != FORMAT:
            raise UserError(f"{path} holds no compressed experts.")
        made = cls(view, int(header["auxiliary"]))
        for position, layer in enumerate(made.vectors):
            for part, vector in layer.items():
                found = tensors.get(f"{position}.{part}")
                if found is None or found.shape != vector.shape:
                    raise UserError(f"{path} holds the vectors of another model.")
                vector.data.copy_(found)
        return made


@register(
    "skipping",
    "compressed-experts",
    title="The last choices of a token as vectors that modulate the first",
    paper="Compressed Experts 2503.00634",
    needs=("training",),
    lossless=False,
    limits="Fewer experts run, none goes. The vectors alone are trained, the model stays.",
    options={"file": "vectors that moekit compress compressed-experts has written"},
)
@contextmanager
def compressed_experts(view: MoEView, *, file: Path) -> Iterator[CompressedExperts]:
    """Run the model of `view` with the vectors in `file`."""
    made = CompressedExperts.load(Path(file), view)
    with made.active():
        yield made


def train_compressed_experts(
    view: MoEView,
    batches: Sequence[Batch | Tensor],
    auxiliary: int,
    *,
    learning_rate: float = 1e-2,
    passes: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[CompressedExperts, list[float]]:
    """Fit the vectors to the text of `batches` by the language-model loss; returns them and losses.

    The published method trains the whole model along for two epochs; here the weights stay, so that
    the result is a small file beside an unchanged checkpoint. The learning rate falls to 0 by a
    cosine. Raises UserError as `CompressedExperts` does, and for no text.
    """
    if not len(batches):
        raise UserError("there is no text to train on: 0 sequences.")
    model: Any = view.model
    made = CompressedExperts(view, auxiliary)
    optimizer = torch.optim.AdamW(made.parameters, lr=learning_rate, weight_decay=0.0)
    steps = passes * len(batches)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    with made.active(), _frozen(model), torch.enable_grad():
        for step in range(steps):
            loss = _loss(model, batches[step % len(batches)])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            if progress is not None:
                progress(step + 1, steps)
    for vector in made.parameters:
        vector.requires_grad_(False)
    return made, losses


def _run(
    layer: MoELayer,
    vectors: Mapping[str, Tensor],
    auxiliary: int,
    experts: nn.Module,
    hidden: Tensor,
    ids: Tensor,
    weights: Tensor,
) -> Tensor:
    """The routed output [T, D] of the main choices, which keep their weights."""
    order = weights.argsort(dim=-1, descending=True, stable=True)
    ids, weights = ids.gather(-1, order), weights.gather(-1, order)
    modulation = _modulation(vectors, ids[:, -auxiliary:], weights[:, -auxiliary:], hidden.dtype)
    total = torch.zeros_like(hidden)
    main = ids[:, :-auxiliary]
    for e in main.unique().tolist():
        if not 0 <= e < layer.num_experts:
            continue
        token, choice = (main == e).nonzero(as_tuple=True)
        expert, rows = layer.expert_views(e), hidden[token]
        gate, middle, up = (modulation[part][token] for part in PARTS)
        read = None
        if expert.gate is not None:
            read = functional.linear(rows * gate, expert.gate, expert.gate_bias)
        assert expert.up is not None
        inner = gated(layer, read, functional.linear(rows * up, expert.up, expert.up_bias))
        out = output_of(layer, expert, inner * middle)
        total = total.index_add(0, token, (out * weights[token, choice, None]).to(total.dtype))
    return total


def _modulation(
    vectors: Mapping[str, Tensor], ids: Tensor, weights: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    """For every token the mean of its auxiliary experts' vectors by weight."""
    weights = weights.masked_fill(ids < 0, 0).float()
    share = weights / weights.sum(-1, keepdim=True).clamp_min(1e-20)
    # A token without auxiliary weight is not modulated.
    none = (weights.sum(-1, keepdim=True) == 0).float()
    return {
        part: ((share.unsqueeze(-1) * vector[ids.clamp_min(0)]).sum(1) + none).to(dtype)
        for part, vector in vectors.items()
    }


def _sizes(layer: MoELayer) -> dict[str, int]:
    width, inner = layer.expert_views(0).down.shape
    return {"gate": width, "middle": inner, "up": width}


def _loss(model: Any, batch: Batch | Tensor) -> Tensor:
    batch = Batch(batch) if isinstance(batch, Tensor) else batch
    logits = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits
    labels = batch.ids if batch.mask is None else batch.ids.masked_fill(batch.mask == 0, -100)
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.requires_grad_(False)
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)
