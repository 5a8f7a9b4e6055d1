"""Which experts saw too few tokens, and why."""

from __future__ import annotations

import math
from dataclasses import dataclass

from moekit.core.stats import ExpertStats


@dataclass(frozen=True)
class Shortfall:
    """One expert with fewer tokens than asked for.

    `probability` is the mean softmax of its router logit, None where the router shows no logits;
    `tokens_needed` the length of text at which it has enough, None where it was never chosen.
    """

    layer: int
    name: str
    expert: int
    tokens: int
    reason: str
    probability: float | None
    tokens_needed: int | None


def shortfalls(stats: ExpertStats, min_tokens: int) -> list[Shortfall]:
    """List the experts that fewer than `min_tokens` tokens chose, layer by layer."""
    found = []
    for position, layer in enumerate(stats.layers):
        total = stats.num_tokens(position) if stats.has(position, "tokens") else 0
        if not total:
            continue
        counts = stats.counts(position)[: layer.num_experts]
        fair = int(counts.sum()) / layer.num_experts
        probabilities = (
            stats.by_domain(position, "softmax_sum") / total
            if stats.has(position, "softmax_sum")
            else None
        )
        for expert in (counts < min_tokens).nonzero().flatten().tolist():
            count = int(counts[expert])
            probability = None if probabilities is None else float(probabilities[expert])
            needed = math.ceil(total * min_tokens / count) if count else None
            reason = _reason(count, fair, min_tokens, total, probability, layer.num_choices)
            found.append(
                Shortfall(layer.index, layer.name, expert, count, reason, probability, needed)
            )
    return found


def _reason(
    count: int, fair: float, min_tokens: int, total: int, probability: float | None, choices: int
) -> str:
    """One clause: the text is too short for any expert, or this one is rarely or never chosen."""
    if fair < min_tokens:
        never = "" if count else "never chosen; "
        return f"{never}the text is short: an expert gets {fair:.0f} tokens on average"
    if count:
        return f"rarely chosen: {count / fair:.2f} of the average load"
    if probability is None:
        return f"never chosen in {total} tokens"
    if probability >= 1 / choices:
        # Likely and yet never chosen: something beside the logits decides.
        return (
            f"never chosen in {total} tokens though its mean probability {probability:.4f} is "
            "above average: the router's bias or group limit keeps it out"
        )
    return f"never chosen in {total} tokens; its mean probability is {probability:.4f}"
