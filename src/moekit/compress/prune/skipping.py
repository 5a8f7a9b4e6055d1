"""Skipping chosen experts at run time, token by token, where their weight is small.

A rule says which choices of a token to keep; `skipping` carries it out as a routing transform. That
is lossy, and saves what the skipped experts would have computed.

Shapes: T tokens, K choices, B sequences, S tokens of each, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal, Protocol, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moekit.core.collect import Batch, collect
from moekit.core.errors import UserError
from moekit.core.forward_context import scopes_of, token_context
from moekit.core.layer import MoELayer
from moekit.core.port import SeamCall
from moekit.core.registry import Option, register, register_preset
from moekit.core.routing_rule import Routing
from moekit.core.spec import spec_of
from moekit.core.stats import ExpertStats
from moekit.core.stats_table import RATIO_BINS
from moekit.core.view import MoEView
from moekit.profile.attention import AttentionTap, attention_received, eager_attention
from moekit.profile.experts_run import run_routed

KIND = "skipping"
Importance = Literal["attention", "norm"]


class Rule(Protocol):
    """Which choices run: `keep(layer, routing, hidden [T, D])` is a mask [T, K]."""

    def keep(self, layer: MoELayer, routing: Routing, hidden: Tensor) -> Tensor: ...


@dataclass
class Skipped:
    """Choices that the router made and that were run, over all layers under the rule."""

    chosen: int = 0
    run: int = 0

    @property
    def share(self) -> float:
        """The share of choices that were skipped."""
        return 1 - self.run / self.chosen if self.chosen else 0.0


@contextmanager
def skipping(view: MoEView, rule: Rule, layers: Iterable[int] | None = None) -> Iterator[Skipped]:
    """Run the model with only those choices that `rule` keeps; `layers` are positions, all if None.

    Where the family normalises the weights of a token's choices, what the skipped ones had goes to
    the others in proportion; elsewhere the others keep their weights. The yielded counts grow as
    the model runs; padding counts too.
    """
    counted = Skipped()
    transform = _transform(view, rule, counted)
    with view.transform_routing(transform, on="selection", layers=layers):
        yield counted


def skipping_errors(view: MoEView, batches: Sequence[Batch | Tensor], rule: Rule) -> list[float]:
    """What the rule alone changes of each layer's routed output on its own inputs, relative.

    By position, the norm of the change over that of the output. ODP skips only in the layers where
    this is least (`quietest`).
    """
    transform = _transform(view, rule, Skipped())
    change, size = torch.zeros(len(view)), torch.zeros(len(view))

    def see(call: SeamCall) -> None:
        rows = slice(None) if call.mask is None else call.mask.bool()
        with torch.no_grad():
            routing = transform(call.layer, Routing(None, call.weights, call.ids), call.hidden)
            plain, skipped = (
                run_routed(call.layer, call.hidden, ids, weights, lambda _: None)[rows].float()
                for ids, weights in ((call.ids, call.weights), (routing.ids, routing.weights))
            )
        change[call.layer.position] += (skipped - plain).square().sum().cpu()
        size[call.layer.position] += plain.square().sum().cpu()

    with view.observe(see):
        collect(view, batches, [])
    return (change / size.clamp(min=torch.finfo(size.dtype).tiny)).sqrt().tolist()


def quietest(errors: Sequence[float], count: int) -> list[int]:
    """The positions of the `count` layers with the smallest errors, in order."""
    return sorted(sorted(range(len(errors)), key=lambda p: errors[p])[:count])


def _transform(
    view: MoEView, rule: Rule, counted: Skipped
) -> Callable[[MoELayer, Routing, Tensor], Routing]:
    normalized = normalized_layers(view)

    def transform(layer: MoELayer, routing: Routing, hidden: Tensor) -> Routing:
        used = routing.ids >= 0
        kept = rule.keep(layer, routing, hidden) & used
        counted.chosen += int(used.sum())
        counted.run += int(kept.sum())
        weights = routing.weights.masked_fill(~kept, 0)
        if normalized[layer.position]:
            weights = keeping_sum(weights, routing.weights)
        return Routing(routing.logits, weights, routing.ids.masked_fill(~kept, -1))

    return transform


def normalized_layers(view: MoEView) -> list[bool]:
    """By position: whether the family divides the weights of a token's choices by their sum."""
    spec = spec_of(cast(PreTrainedModel, view.model))
    return [bool(layer.normalize) for layer in spec.per_layer]


def keeping_sum(weights: Tensor, before: Tensor) -> Tensor:
    """Weights [T, K] scaled so that each token has the sum it had; unchanged where nothing went."""
    total, left = before.sum(-1, keepdim=True), weights.sum(-1, keepdim=True)
    return weights.where((left == total) | (left == 0), weights * (total / left))


def thresholds(stats: ExpertStats, quantile: float = 0.5) -> dict[int, float]:
    """By position: the ratio of a token's second to its first weight below which a share lies.

    From the histogram of the stats, to 1/256. Raises UserError for a quantile outside of 0 to 1 and
    for models whose tokens have one choice.
    """
    if not 0 <= quantile <= 1:
        raise UserError(f"quantile {quantile} is a share, between 0 and 1.")
    found = {}
    for position in range(len(stats.layers)):
        counts = stats.get(position, "weight_ratio").double().cumsum(0)
        below = counts / counts[-1].clamp(min=1)
        # Edges of the bins, so that 0 skips nothing.
        found[position] = int((below <= quantile).sum()) / RATIO_BINS if quantile else 0.0
    return found


@dataclass
class WeightRatio:
    """Skips a choice whose weight is less than `thresholds[position]` of its token's largest.

    `important`, if given, holds tokens that keep all of their choices.
    """

    thresholds: Mapping[int, float]
    important: ImportantTokens | None = None

    def keep(self, layer: MoELayer, routing: Routing, hidden: Tensor) -> Tensor:
        weights = routing.weights
        first = weights.max(-1, keepdim=True).values
        kept = (weights >= self.thresholds.get(layer.position, 0.0) * first) | (weights == first)
        if self.important is not None:
            kept = kept | self.important.of(layer, hidden).unsqueeze(-1)
        return kept


class ImportantTokens:
    """The `share` of every sequence's tokens that are large and much attended to.

    A token's importance is its |hidden| summed times the mean attention it gets from itself and
    later tokens (`attention_received`); with "norm" all tokens are taken to get what equal
    attention gives, which is what MC-MoE's released code computes. Decoding steps of one token
    have no important ones.
    """

    def __init__(self, view: MoEView, share: float, importance: Importance) -> None:
        self._view, self._share, self._importance = view, share, importance
        self._tap: AttentionTap | None = None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """See the attention weights of forwards inside, for which it runs as plain products."""
        if self._importance == "norm":
            yield
            return
        with eager_attention(self._view.model):
            self._tap = AttentionTap(self._view.model, self._view)
            try:
                yield
            finally:
                self._tap.close()
                self._tap = None

    def of(self, layer: MoELayer, hidden: Tensor) -> Tensor:
        """[T], True at the important tokens of hidden [T, D]."""
        context = token_context(scopes_of(self._view.model, layer.name), len(hidden))
        chosen = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device)
        if context.batch_shape is None or context.batch_shape[1] == 1:
            return chosen
        shape = context.batch_shape
        mask = None if context.mask is None else context.mask.bool().view(shape)
        received = self._received(layer, shape[1], mask).to(hidden.device)
        score = hidden.float().abs().sum(-1).view(shape) * received
        if mask is not None:
            score = score.masked_fill(~mask, -1)
        number = max(1, round(self._share * shape[1]))
        best = score.topk(number, dim=-1).indices
        chosen.view(shape).scatter_(-1, best, True)
        return chosen

    def _received(self, layer: MoELayer, length: int, mask: Tensor | None) -> Tensor:
        if self._importance == "norm":
            return 1 / torch.arange(length, 0, -1.0)
        weights = self._tap.take(layer) if self._tap is not None else None
        if weights is None:
            raise UserError(
                f"{layer.name}: its attention shows no weights; take importance=norm, or "
                "protected=0."
            )
        return attention_received(weights, mask)


@register(
    KIND,
    "odp",
    title="Skip choices far lighter than the token's first, except at important tokens",
    paper="MC-MoE 2410.06270",
    needs=("data",),
    lossless=False,
    limits="Made for two choices a token; of more, each is compared with the first. Attention runs "
    "as plain matrix products so that its weights can be seen (importance=norm does without).",
    options={
        "quantile": "share of the calibration tokens whose second choice is skipped",
        "protected": "share of a sequence's tokens that keep all of their choices",
        "importance": "attention received, or norm: the released code's form, without attention",
        "layers": "positions of the MoE layers to skip in; all by default",
    },
)
@contextmanager
def odp(
    view: MoEView,
    stats: ExpertStats,
    *,
    quantile: float = 0.5,
    protected: float = 0.02,
    importance: Importance = "attention",
    layers: Sequence[int] | None = None,
) -> Iterator[Skipped]:
    """Run the model inside with light choices skipped; yields the counts.

    A choice is skipped where its weight is below the layer's threshold (`thresholds(stats,
    quantile)`) times the token's largest. Raises UserError for a model without a second choice.
    """
    important = ImportantTokens(view, protected, importance) if protected else None
    rule = WeightRatio(thresholds(stats, quantile), important)
    with important.watched() if important else nullcontext(), skipping(view, rule, layers) as found:
        yield found


register_preset(
    odp,
    "naee-skipping",
    kind=KIND,
    title="Skip choices far lighter than the token's first",
    paper="NAEE 2402.14800",
    needs=("data",),
    lossless=False,
    limits="Made for two choices a token; of more, each is compared with the first.",
    settings={"protected": 0.0},
    options=(
        Option("quantile", "float", "share of the tokens whose second choice is skipped", 0.5),
        Option("layers", "Sequence[int] | None", "positions of the MoE layers to skip in"),
    ),
)
