"""The loss of every token of some texts, one text at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moekit.core.view import MoEView
from moekit.evaluate.padded_experts import padded_experts


def token_losses(view: MoEView, samples: Sequence[tuple[list[int], str]]) -> list[Tensor]:
    """Each sample's losses (nats) of the tokens after its first, [T - 1] in float64."""
    device = next(view.model.parameters()).device
    found = []
    with torch.inference_mode(), padded_experts(view.model):
        for ids, _ in samples:
            tokens = torch.tensor([ids], device=device)
            logits = view.model(input_ids=tokens, use_cache=False).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(
                logits.float(), tokens[0, 1:], reduction="none"
            )
            found.append(loss.double().cpu())
    return found
