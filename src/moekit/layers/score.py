"""Where router logits come from: parts `score(key [U, Dk], context) -> logits [U, E]`."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .context import RouterContext


class LinearScore(nn.Module):
    """One row of weights an expert, no bias; in training the key is multiplied by 1 +- `jitter`.

    Switch Transformer, arXiv 2101.03961, for the jitter.
    """

    def __init__(self, width: int, num_experts: int, *, jitter: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, width))
        self.jitter = jitter
        self.init_weights_with(0.02)

    def init_weights_with(self, std: float) -> None:
        nn.init.normal_(self.weight, std=std)

    def forward(self, key: Tensor, context: RouterContext) -> Tensor:
        if self.jitter and context.training:
            draw = torch.rand(
                key.shape,
                generator=context.generator("jitter", key.device),
                device=key.device,
            )
            key = key * (1 + self.jitter * (2 * draw - 1))
        return F.linear(key, self.weight.float())


class MLPScore(nn.Module):
    """Two layers, `hidden` wide between them, with `activation` "tanh" or "gelu"; no biases."""

    def __init__(
        self, width: int, num_experts: int, hidden: int, *, activation: str = "gelu"
    ) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(hidden, width))
        self.down = nn.Parameter(torch.empty(num_experts, hidden))
        functions: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "gelu": F.gelu}
        self.activation = functions[activation]
        self.init_weights_with(0.02)

    def init_weights_with(self, std: float) -> None:
        for weight in (self.up, self.down):
            nn.init.normal_(weight, std=std)

    def forward(self, key: Tensor, context: RouterContext) -> Tensor:
        middle = self.activation(F.linear(key, self.up.float()))
        return F.linear(middle, self.down.float())


class CosineScore(nn.Module):
    """Cosine of the key and one prototype an expert, times a learned inverse temperature."""

    def __init__(self, width: int, num_experts: int, *, temperature: float = 0.1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, width))
        self.log_scale = nn.Parameter(torch.tensor(1 / temperature).log())
        self.init_weights_with(0.02)

    def init_weights_with(self, std: float) -> None:
        nn.init.normal_(self.weight, std=std)

    def forward(self, key: Tensor, context: RouterContext) -> Tensor:
        cosine = F.linear(F.normalize(key, dim=-1), F.normalize(self.weight.float(), dim=-1))
        return cosine * self.log_scale.exp()
