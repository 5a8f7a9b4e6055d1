"""Layers of known structure: experts that are noisy copies of a few prototypes."""

from __future__ import annotations

import torch

from moekit.compress.condense.context import LayerContext
from moekit.core.expert_weights import ExpertWeights
from moekit.core.stats import ExpertStats, StatsLayer

WIDTH, INNER, TOKENS = 12, 10, 400


def random_expert(seed: int, biased: bool = False, gated: bool = True) -> ExpertWeights:
    source = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=source)

    return ExpertWeights(
        draw(INNER, WIDTH) if gated else None,
        draw(INNER, WIDTH),
        draw(WIDTH, INNER),
        draw(INNER) if biased and gated else None,
        draw(INNER) if biased else None,
        draw(WIDTH) if biased else None,
    )


def noisy(expert: ExpertWeights, scale: float, seed: int) -> ExpertWeights:
    source = torch.Generator().manual_seed(seed)
    return ExpertWeights(
        **{
            name: part + scale * torch.randn(part.shape, generator=source)
            for name, part in expert.tensors().items()
        },
        **({} if expert.gate is not None else {"gate": None}),
    )


def middle(expert: ExpertWeights, hidden: torch.Tensor) -> torch.Tensor:
    up = hidden @ expert.up.T
    if expert.up_bias is not None:
        up = up + expert.up_bias
    if expert.gate is None:
        return torch.relu(up)
    gate = hidden @ expert.gate.T
    if expert.gate_bias is not None:
        gate = gate + expert.gate_bias
    return torch.nn.functional.silu(gate) * up


def run(expert: ExpertWeights, hidden: torch.Tensor) -> torch.Tensor:
    out = middle(expert, hidden) @ expert.down.T
    return out if expert.down_bias is None else out + expert.down_bias


def inputs(seed: int = 7, tokens: int = TOKENS) -> torch.Tensor:
    return torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(seed))


def context_of(
    experts: list[ExpertWeights],
    logits: torch.Tensor | None = None,
    importance: torch.Tensor | None = None,
    seed: int = 0,
) -> LayerContext:
    """A layer of `experts` with its statistics over `inputs`; `logits` [T, E] default to noise."""
    number = len(experts)
    hidden = inputs()
    outputs = torch.stack([run(expert, hidden) for expert in experts]).double()
    source = torch.Generator().manual_seed(seed)
    if logits is None:
        logits = torch.randn(TOKENS, number, generator=source)
    if importance is None:
        importance = torch.arange(number, 0, -1).double()
    held = {
        "logit_gram": logits.double().T @ logits.double(),
        "output_tokens": torch.tensor(TOKENS),
        "output_sum": outputs.sum(1),
        "output_gram": outputs.flatten(1) @ outputs.flatten(1).T,
    }
    stats = ExpertStats(
        "planted",
        [StatsLayer(0, "layers.0", number, number, 2)],
        [""],
        held={(0, name): value for name, value in held.items()},
    )
    return LayerContext(stats, 0, importance, experts.__getitem__, seed)
