"""How much every expert matters: one kernel over `ExpertStats`, the published scores as its rows.

    score = AGG over the tokens routed to the expert of gate^p * norm^q * contribution^s

`gate` is the final weight of the expert in its token, `norm` that of the expert's output before the
gate, `contribution` how far the experts together turned the token (EASY-EP). AGG is the sum, the
mean over the expert's own tokens ("routed"), or the mean over all tokens ("all"). An expert that no
token chose scores 0, so it goes first. E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from moekit.core.errors import UserError
from moekit.core.registry import register, register_preset, registry
from moekit.core.seeds import generator
from moekit.core.stats import ExpertStats

KIND = "saliency"
Aggregate = Literal["sum", "routed", "all"]
Scores = list[Tensor]


def saliency(
    stats: ExpertStats,
    *,
    gate: int = 0,
    norm: int = 0,
    contribution: int = 0,
    aggregate: Aggregate = "sum",
    domain: str | None = None,
) -> Scores:
    """Score every expert of every MoE layer by the formula above: [E] each, float64.

    `domain` takes the tokens of one domain. Raises UserError for exponents or a domain that the
    stats do not have.
    """
    scores = []
    for position, layer in enumerate(stats.layers):
        total = stats.saliency_sum(position, gate, norm, contribution, domain).double()
        if aggregate == "routed":
            total = total / stats.counts(position, domain).clamp(min=1)
        elif aggregate == "all":
            total = total / max(stats.num_tokens(position, domain), 1)
        scores.append(total[: layer.num_experts])
    return scores


@register(
    KIND,
    "tcess",
    title="Mean router logit of the tokens that have the expert among their best",
    paper="PreMoe 2505.17639",
    needs=("data",),
    limits="Logits may be negative: an expert that is never among the best ranks below all that "
    "are. Needs a router with a matrix.",
    options={"top1": "only the largest logit of a token counts, as in the published code"},
)
def tcess(stats: ExpertStats, *, top1: bool = False, domain: str | None = None) -> Scores:
    """Score by the mean over all tokens of the logits kept for an expert: [E] each.

    Without `top1` a token keeps its top-k logits whose softmax among them is at least the share
    that the stats were collected with (`kept_share`, 0 by default).
    """
    name = "top_logit_sum" if top1 else "kept_logit_sum"
    scores = []
    for position, layer in enumerate(stats.layers):
        total = stats.by_domain(position, name, domain)[: layer.num_experts].double()
        unused = total == 0
        mean = total / max(stats.num_tokens(position, domain), 1)
        scores.append(mean.masked_fill(unused, float(mean.min()) - 1))
    return scores


@register(
    KIND,
    "max-activation",
    title="Largest absolute output of the expert before its gate",
    paper="REAP 2510.13999",
    needs=("data",),
    limits="One token decides. Of all domains together: maxima are not kept by domain.",
)
def max_activation(stats: ExpertStats, *, domain: str | None = None) -> Scores:
    """Score by `output_max`: [E] each. Raises UserError for a single domain."""
    if domain is not None:
        raise UserError(f"max-activation is not kept by domain, so {domain!r} cannot be taken out.")
    return [
        stats.get(position, "output_max")[: layer.num_experts].double()
        for position, layer in enumerate(stats.layers)
    ]


@register(
    KIND,
    "random",
    title="Chance: what any score must beat",
    options={"seed": "seed of the order"},
)
def random(stats: ExpertStats, *, seed: int = 0, domain: str | None = None) -> Scores:
    """Score by uniform random numbers keyed by (seed, layer): [E] each."""
    return [
        torch.rand(
            layer.num_experts, generator=generator(seed, KIND, layer.index), dtype=torch.float64
        )
        for layer in stats.layers
    ]


# name: exponents of gate, norm, contribution; aggregation; title; paper; limits
_REAP, _STUDY = "REAP 2510.13999", "MoE scoring study 2606.15716"
_PRESETS: dict[str, tuple[tuple[int, int, int], Aggregate, str, str]] = {
    "frequency": ((0, 0, 0), "sum", "How many tokens chose the expert", "UNCURL 2409.01483"),
    "gate-mass": ((1, 0, 0), "sum", "Sum of the expert's gate weights", _REAP),
    "dern": ((1, 0, 0), "all", "Mean gate weight over all tokens", "DERN 2509.10377"),
    "ean": ((0, 1, 0), "sum", "Sum of the norms of the expert's outputs", _REAP),
    "gated-ean": ((1, 1, 0), "sum", "Sum of gate times norm of the expert's outputs", _REAP),
    "reap": ((1, 1, 0), "routed", "Mean of gate times norm over the expert's tokens", _REAP),
    "man": ((0, 1, 0), "routed", "Mean norm over the expert's tokens (EAN's mean)", _STUDY),
    "msan": ((0, 2, 0), "routed", "Mean squared norm over the expert's tokens", _STUDY),
    "easy-ep": (
        (1, 1, 1),
        "sum",
        "Sum of gate times norm times how far the token was turned",
        "EASY-EP 2504.06792",
    ),
}
for _name, (_exponents, _aggregate, _title, _paper) in _PRESETS.items():
    register_preset(
        saliency,
        _name,
        kind=KIND,
        title=_title,
        paper=_paper,
        needs=("data",),
        settings={
            **dict(zip(("gate", "norm", "contribution"), _exponents, strict=True)),
            "aggregate": _aggregate,
        },
    )


def score(
    stats: ExpertStats,
    method: str,
    *,
    domain: str | None = None,
    by_domain: bool = False,
    **options: Any,
) -> Scores:
    """Scores [E] by layer under the registered saliency `method`; `options` are those it takes.

    `by_domain` lets every domain count the same: each domain's scores are divided by their sum in
    the layer and added (EASY-EP's rule for several domains). Raises UserError for an unknown method
    or domain, and where the stats lack what the method needs.
    """
    fn: Callable[..., Scores] = registry.find(method, kind=KIND).load()
    if not by_domain:
        return fn(stats, domain=domain, **options)
    if domain is not None:
        raise UserError("every domain alike and one domain only exclude each other.")
    parts = [fn(stats, domain=name, **options) for name in stats.domains]
    return [sum(map(share, layers[1:]), share(layers[0])) for layers in zip(*parts, strict=True)]


def share(scores: Tensor) -> Tensor:
    """Scores [E] shifted to be non-negative and divided by their sum; equal where all are 0."""
    shifted = scores - scores.min().clamp(max=0)
    total = shifted.sum()
    return shifted / total if total > 0 else torch.full_like(scores, 1 / len(scores))
