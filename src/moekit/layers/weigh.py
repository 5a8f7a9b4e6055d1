"""From scores to the weights of the chosen experts: parts `weigh(scores, choice, context)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .context import RouterContext
from .router import Choice


def chosen_scores(scores: Tensor, choice: Choice) -> Tensor:
    """The score of every chosen pair [N]."""
    if choice.top_k is None:
        return scores[choice.unit, choice.expert]
    # Its backward is a scatter along rows, that of two indices one over the whole matrix.
    return scores.gather(1, choice.expert.view(-1, choice.top_k)).reshape(-1)


class RawWeights:
    """The scores of the chosen experts as they are, times `scale`."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def __call__(self, scores: Tensor, choice: Choice, context: RouterContext) -> Tensor:
        return chosen_scores(scores, choice) * self.scale


class RenormalisedWeights:
    """The scores of the chosen experts over their sum, times `scale`.

    With one expert a unit the weight is a constant: the router gets no gradient from the task.
    """

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def __call__(self, scores: Tensor, choice: Choice, context: RouterContext) -> Tensor:
        raw = chosen_scores(scores, choice)
        if choice.top_k is not None:
            rows = raw.view(-1, choice.top_k)
            # Sigmoid scores may all be tiny; DeepSeek-V3 guards the sum in the same way.
            return (rows / (rows.sum(-1, keepdim=True) + 1e-20)).reshape(-1) * self.scale
        total = raw.new_zeros(scores.shape[0]).index_add(0, choice.unit, raw)
        return raw / (total[choice.unit] + 1e-20) * self.scale


WEIGHTS: dict[str, Callable[..., Any]] = {"raw": RawWeights, "renormalised": RenormalisedWeights}
