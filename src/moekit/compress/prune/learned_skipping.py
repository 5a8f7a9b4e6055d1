"""OTP: a small network per layer that learns how many of a token's experts to run.

MC# (2510.10962) publishes the idea, not the sizes: candidates are the prefixes of a token's choices
in the order of their weights (keep the first j of K), chosen by a Gumbel softmax while training and
by the largest logit afterwards. Width, schedule and the multiplier that steers the share of choices
kept are ours.

Shapes: T tokens, K choices, D width of the experts' input, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax

from moekit.compress.prune.skipping import KIND, Skipped, keeping_sum, normalized_layers, skipping
from moekit.core.collect import Batch
from moekit.core.errors import UserError
from moekit.core.layer import MoELayer
from moekit.core.registry import register
from moekit.core.routing_rule import Routing
from moekit.core.seeds import generator
from moekit.core.view import MoEView

FORMAT = "moekit.otp"
# The hidden layer has D / NARROWER units.
NARROWER = 16
# Logit by which keeping everything leads before training.
LEAD = 2.0
# How fast the price of a choice follows the share of choices that are kept.
PRICE_RATE = 0.2


class KeepNetwork(nn.Module):
    """Logits [T, K] over keeping 1 to K choices, of inputs [T, D] and sorted weights [T, K]."""

    def __init__(self, width: int, top_k: int, rng: torch.Generator) -> None:
        super().__init__()
        inner = max(4, width // NARROWER)
        self.inner = nn.Linear(width + top_k, inner)
        self.outer = nn.Linear(inner, top_k)
        with torch.no_grad():
            self.inner.weight.normal_(0, (width + top_k) ** -0.5, generator=rng)
            self.inner.bias.zero_()
            self.outer.weight.zero_()
            self.outer.bias.zero_()
            self.outer.bias[-1] = LEAD

    def forward(self, hidden: Tensor, weights: Tensor) -> Tensor:
        features = torch.cat([hidden.float(), weights.float()], dim=-1)
        return self.outer(nn.functional.silu(self.inner(features)))


class LearnedSkipping(nn.Module):
    """A rule for `skipping`: each token keeps as many choices as its layer's network says."""

    def __init__(self, view: MoEView, seed: int = 0) -> None:
        super().__init__()
        self.networks = nn.ModuleDict(
            {
                str(layer.position): KeepNetwork(
                    _width(layer), layer.top_k, generator(seed, "otp", layer.index)
                )
                for layer in view
            }
        )
        self.to(next(view.model.parameters()).device)

    def logits(self, layer: MoELayer, routing: Routing, hidden: Tensor) -> Tensor:
        """Over keeping 1 to K choices: [T, K]."""
        ordered = routing.weights.sort(dim=-1, descending=True).values
        made: Tensor = self.networks[str(layer.position)](hidden, ordered)
        return made

    @torch.no_grad()
    def keep(self, layer: MoELayer, routing: Routing, hidden: Tensor) -> Tensor:
        """The first choices of every token in the order of their weights, a mask [T, K]."""
        last = self.logits(layer, routing, hidden).argmax(-1, keepdim=True)
        return _ranks(routing.weights) <= last

    def save(self, path: str | Path) -> None:
        """Write the networks as safetensors."""
        tensors = {name: value.contiguous() for name, value in self.state_dict().items()}
        save_file(tensors, path, metadata={"format": FORMAT})

    @classmethod
    def load(cls, view: MoEView, path: str | Path) -> LearnedSkipping:
        """Read networks for a model; raises UserError for others or a damaged file."""
        made = cls(view)
        try:
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("format") != FORMAT:
                    raise UserError(f"{path} holds no networks for skipping.")
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            made.load_state_dict(state)
        except (OSError, SafetensorError, json.JSONDecodeError) as error:
            raise UserError(f"{path} cannot be read: {error}") from error
        except RuntimeError as error:
            first = str(error).splitlines()[-1].strip()
            raise UserError(f"{path} is of a model with other layers: {first}") from error
        return made


def _width(layer: MoELayer) -> int:
    return int(layer.expert_views(0).down.shape[0])


def _ranks(weights: Tensor) -> Tensor:
    """The place of each choice in the order of its token's weights: [T, K]."""
    return weights.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)


def train_skipping(
    view: MoEView,
    batches: Sequence[Batch | Tensor],
    *,
    keep: float = 0.75,
    steps: int = 200,
    learning_rate: float = 5e-3,
    temperatures: tuple[float, float] = (1.0, 0.1),
    seed: int = 0,
    progress: Callable[[float, int], None] | None = None,
) -> LearnedSkipping:
    """Train the networks so that a share `keep` of the choices gives the model's own output.

    The loss is the divergence from the unmasked model's next-token distribution plus a price on
    every choice, which rises while more than `keep` are kept and falls to 0 below. The model's
    weights stay as they are. One of `batches` a step, in turn; `temperatures` are those of the
    Gumbel softmax at the first and last step. Raises UserError for a share outside of (0, 1] or
    no data.
    """
    if not 0 < keep <= 1:
        raise UserError(f"keep {keep} is the share of choices to run, above 0 and at most 1.")
    if not batches:
        raise UserError("there is no text to train on: 0 sequences.")
    rule = LearnedSkipping(view, seed)
    optimizer = torch.optim.Adam(rule.parameters(), lr=learning_rate)
    noise, price = generator(seed, "otp"), 0.0
    with _frozen(view.model):
        for step in range(steps):
            share = step / max(steps - 1, 1)
            temperature = temperatures[0] * (temperatures[1] / temperatures[0]) ** share
            batch = batches[step % len(batches)]
            with torch.no_grad():
                target = _log_probabilities(view.model, batch)
            with _soft(view, rule, temperature, noise) as kept:
                found = _log_probabilities(view.model, batch)
            mean = torch.stack(kept).mean()
            loss = kl_div(found, target, log_target=True, reduction="batchmean") + price * mean
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            price = max(0.0, price + PRICE_RATE * (float(mean.detach()) - keep))
            if progress is not None:
                progress(step + 1, steps)
    return rule.eval()


@contextmanager
def _soft(
    view: MoEView, rule: LearnedSkipping, temperature: float, noise: torch.Generator
) -> Iterator[list[Tensor]]:
    """Weights times the soft masks; the list grows by each layer's share of choices kept."""
    kept: list[Tensor] = []
    normalized = normalized_layers(view)

    def transform(layer: MoELayer, routing: Routing, hidden: Tensor) -> Routing:
        logits = rule.logits(layer, routing, hidden)
        uniform = torch.rand(logits.shape, generator=noise).clamp(min=1e-9).to(logits.device)
        chosen = ((logits - (-uniform.log()).log()) / temperature).softmax(-1)
        # The choice of rank r runs where r or more choices are kept.
        by_rank = chosen.flip(-1).cumsum(-1).flip(-1)
        kept.append(by_rank.mean())
        mask = by_rank.gather(-1, _ranks(routing.weights)).to(routing.weights.dtype)
        weights = routing.weights * mask
        if normalized[layer.position]:
            weights = keeping_sum(weights, routing.weights)
        return Routing(routing.logits, weights, routing.ids)

    with view.transform_routing(transform, on="selection"):
        yield kept


def _log_probabilities(model: Any, batch: Batch | Tensor) -> Tensor:
    """Log probabilities [T, V] of the next token at the places that are no padding."""
    ids, mask = (batch, None) if isinstance(batch, Tensor) else (batch.ids, batch.mask)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    flat = log_softmax(logits.flatten(0, 1).float(), dim=-1)
    return flat if mask is None else flat[mask.flatten().bool()]


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@register(
    KIND,
    "otp",
    title="A small trained network per layer says how many of a token's experts run",
    paper="MC# 2510.10962",
    needs=("data", "training"),
    lossless=False,
    limits="Candidates, widths and schedule are ours; the paper does not give them.",
    options={"file": "the networks that `train_skipping` made and `LearnedSkipping.save` wrote"},
)
@contextmanager
def otp(view: MoEView, stats: object = None, *, file: str | Path) -> Iterator[Skipped]:
    """Run the model inside with the choices that the networks in `file` keep; yields the counts."""
    with skipping(view, LearnedSkipping.load(view, file)) as found:
        yield found
