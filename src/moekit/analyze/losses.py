"""The loss of every token of some texts, one text at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from moekit.core.view import MoEView


def token_losses(view: MoEView, samples: Sequence[tuple[list[int], str]]) -> Iterator[Tensor]:
    """Yield each sample's losses (nats) of the tokens after its first, [T - 1] in float64."""
    device = next(view.model.parameters()).device
    for ids, _ in samples:
        tokens = torch.tensor([ids], device=device)
        with torch.inference_mode():
            logits = view.model(input_ids=tokens, use_cache=False).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(
                logits.float(), tokens[0, 1:], reduction="none"
            )
        yield loss.double().cpu()
