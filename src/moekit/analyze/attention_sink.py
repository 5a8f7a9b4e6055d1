"""How much attention goes to the first token of a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moekit.core.view import MoEView
from moekit.profile.attention import eager_attention

# Attention weights take memory with the square of the length, and a sink shows early.
LENGTH = 128
SAMPLES = 32
# Tokens so early attend to few others, so that the first one gets much without being a sink.
SKIPPED = 16


@dataclass(frozen=True)
class Sink:
    """Mean attention on the first token, over layers, heads and later tokens.

    `uniform` is what equal attention to all visible tokens would give.
    """

    strength: float
    uniform: float


def attention_sink(view: MoEView, samples: Sequence[Sequence[int]]) -> Sink | None:
    """Measure attention to the first token; None where a model shows no attention weights.

    Samples of 16 tokens or fewer do not count, and longer ones up to their 128th token.
    """
    model: Any = view.model
    device = next(model.parameters()).device
    strengths, uniform = [], []
    long_enough = [list(ids)[:LENGTH] for ids in samples if len(ids) > SKIPPED]
    with eager_attention(model), torch.inference_mode():
        for ids in long_enough[:SAMPLES]:
            tokens = torch.tensor([ids], device=device)
            output = model(input_ids=tokens, use_cache=False, output_attentions=True)
            visible = torch.arange(SKIPPED + 1, len(ids) + 1)
            for weights in getattr(output, "attentions", None) or ():
                if weights is not None and weights.shape[-2:] == (len(ids), len(ids)):
                    strengths.append(float(weights[0, :, SKIPPED:, 0].float().mean()))
                    uniform.append(float((1 / visible).mean()))
    if not strengths:
        return None
    return Sink(sum(strengths) / len(strengths), sum(uniform) / len(uniform))
