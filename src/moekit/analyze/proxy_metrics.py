"""Statistics of a model's predictions on written-out text that forecast downstream quality."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moekit.analyze.rerun import output_logits
from moekit.analyze.result import Result
from moekit.core.errors import UserError
from moekit.core.registry import register
from moekit.core.trace import RoutingTrace
from moekit.core.view import MoEView

TOP = (1, 2, 3, 5)


def token_statistics(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Ten statistics [T] of next-token logits [T, V] against the text's own tokens [T].

    Loss in nats; entropy over its maximum, log V; the rank of the text's token starts at 1; margin
    is the largest probability minus that token's; wrong confidence is the largest probability
    where the model prefers another token, else 0.
    """
    log_p = logits.double().log_softmax(-1)
    own = log_p.gather(1, targets[:, None])
    rank = (log_p > own).sum(1) + 1
    best = log_p.max(1).values.exp()
    entropy = -(log_p.exp() * log_p.clamp_min(-1e4)).sum(1) / math.log(logits.shape[1])
    return {
        "loss": -own[:, 0],
        **{f"top{k}": (rank <= k).double() for k in TOP},
        "entropy": entropy,
        "rank": rank.double(),
        "inverse_rank": 1 / rank,
        "margin": best - own[:, 0].exp(),
        "wrong_confidence": torch.where(rank > 1, best, 0.0),
    }


def token_weights(statistics: dict[str, Tensor], frequency: Tensor) -> dict[str, Tensor]:
    """Seven weightings [T] of the tokens, by their statistics and their frequency [T]."""
    p = (-statistics["loss"]).exp()
    entropy = statistics["entropy"]
    return {
        "uniform": torch.ones_like(p),
        "p": p,
        "1-p": 1 - p,
        "entropy": entropy,
        "1/entropy": 1 / entropy.clamp_min(1e-6),
        "frequency": frequency.double(),
        "1/frequency": 1 / frequency.double(),
    }


@register(
    "measure",
    "proxy-metrics",
    title="Token statistics that forecast downstream quality: entropy, top-k accuracy, rank",
    paper="Proxy Metrics 2605.18607",
    needs=("trace", "weights"),
    limits="The paper's eighth weighting and its fitted scorers are not included.",
    options={"max_tokens": "tokens of the trace to run again, in whole samples spread evenly"},
)
def proxy_metrics(trace: RoutingTrace, view: MoEView, *, max_tokens: int = 4096) -> Result:
    """Run the model on the trace's tokens and average ten statistics under seven weightings.

    Rows are statistics, columns weightings; values are means over tokens, then over samples.
    Frequencies are of the tokens of the trace. Raises UserError without a sample of two tokens.
    """
    _, inverse, counts = trace.tokens.unique(return_inverse=True, return_counts=True)
    share = dict(zip(trace.tokens.tolist(), (counts[inverse] / len(trace)).tolist(), strict=True))
    total: dict[str, dict[str, float]] = {}
    samples = tokens = 0
    for logits, targets in output_logits(trace, view, max_tokens):
        if not len(targets):
            continue
        statistics = token_statistics(logits, targets)
        weights = token_weights(statistics, torch.tensor([share[t] for t in targets.tolist()]))
        for name, values in statistics.items():
            row = total.setdefault(name, dict.fromkeys(weights, 0.0))
            for weighting, weight in weights.items():
                row[weighting] += float((values * weight).sum() / weight.sum().clamp_min(1e-12))
        samples += 1
        tokens += len(targets)
    if not samples:
        raise UserError("no sample of the trace has two tokens: nothing to predict")
    rows = [
        (name, *(value / samples for value in by_weight.values()))
        for name, by_weight in total.items()
    ]
    weightings = list(next(iter(total.values())))
    return Result(
        ("statistic", *weightings),
        rows,
        {"tokens": tokens, "samples": samples, "loss": rows[0][1]},
    )
