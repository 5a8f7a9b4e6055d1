"""How concentrated a labelled behaviour is in experts; it only measures."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moekit.analyze.information import p_value
from moekit.analyze.reading import (
    check_domain,
    check_filled,
    sample_domains,
    sample_lengths,
    usage_by_sample,
)
from moekit.analyze.result import Result
from moekit.core.registry import register
from moekit.core.seeds import derive_seed
from moekit.core.trace import RoutingTrace

Array = NDArray[np.float64]


@register(
    "measure",
    "behaviour-audit",
    title="Concentration in experts of what sets two sets of prompts apart",
    paper="GateBreaker (measurement stages only)",
    needs=("trace",),
    limits="It only measures. Compare with pairs of topics or languages as a yardstick.",
    options={
        "positive": "the domain that shows the behaviour",
        "negative": "the domain that does not",
        "permutations": "random exchanges of prompts",
        "top": "experts to report",
        "min_tokens": "tokens a domain must have",
        "seed": "seed of the permutations",
    },
)
def behaviour_audit(
    trace: RoutingTrace,
    *,
    positive: str,
    negative: str,
    permutations: int = 200,
    top: int = 10,
    min_tokens: int = 100,
    seed: int = 0,
) -> Result:
    """Contrast how often the prompts of two domains use every expert.

    The difference is of mean shares of a prompt's tokens. `top 1 %` and `top 5 %` are the shares of
    all positive difference that so many experts hold, `participation` the effective number of
    experts over all. An expert's `p` accounts for having looked at all experts. Raises UserError
    for a missing domain or too little text.
    """
    check_filled(trace)
    for name in (positive, negative):
        check_domain(trace, name, min_tokens)
    lengths, domains = sample_lengths(trace), sample_domains(trace)
    member = {
        name: np.nonzero((domains == trace.domains.index(name)) & (lengths > 0))[0]
        for name in (positive, negative)
    }
    prompts = np.concatenate([member[positive], member[negative]])
    profiles = np.concatenate(
        [
            usage_by_sample(trace, position)[prompts] / lengths[prompts][:, None]
            for position in range(len(trace.layers))
        ],
        axis=1,
    )
    label = np.arange(len(prompts)) < len(member[positive])
    random = np.random.default_rng(derive_seed(seed, "behaviour-audit"))
    found = _difference(profiles, label)
    null = np.stack([_difference(profiles, random.permutation(label)) for _ in range(permutations)])
    p_experts = p_value(found, null.max(1)[:, None])
    total = np.abs(null).sum(1)
    places = [
        (layer.index, expert) for layer in trace.layers for expert in range(layer.num_experts)
    ]
    order = np.argsort(-found, kind="stable")[:top]
    return Result(
        ("layer", "expert", "difference", "p"),
        [(*places[i], float(found[i]), float(p_experts[i])) for i in order],
        {
            "positive_prompts": int(label.sum()),
            "negative_prompts": int((~label).sum()),
            "p": float(p_value(float(np.abs(found).sum()), total)),
            "significant_experts": int((p_experts <= 0.05).sum()),
            "top_1_percent": _held_by(found, 0.01),
            "top_5_percent": _held_by(found, 0.05),
            "participation": _participation(found),
            "participation_by_chance": float(np.mean([_participation(row) for row in null])),
        },
        {"difference": found, "p": p_experts},
    )


def _difference(profiles: Array, label: NDArray[np.bool_]) -> Array:
    return profiles[label].mean(0) - profiles[~label].mean(0)


def _held_by(difference: Array, share: float) -> float:
    positive = np.sort(np.maximum(difference, 0))[::-1]
    count = max(1, round(share * len(positive)))
    return float(positive[:count].sum() / max(positive.sum(), 1e-12))


def _participation(difference: Array) -> float:
    positive = np.maximum(difference, 0)
    return float(positive.sum() ** 2 / max((positive**2).sum(), 1e-12) / len(positive))
