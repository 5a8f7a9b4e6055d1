"""Which experts serve which domain or language, against chance."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moekit.analyze.information import mutual_information, npmi, p_value
from moekit.analyze.reading import (
    check_filled,
    compared_domains,
    sample_domains,
    usage_by_sample,
)
from moekit.analyze.result import Result
from moekit.core.registry import register
from moekit.core.seeds import derive_seed
from moekit.core.trace import RoutingTrace


@register(
    "measure",
    "specialisation",
    title="Mutual information of expert and domain, and nPMI of each pair, by permutation",
    paper="OLMoE 2409.02060",
    needs=("trace",),
    limits="Samples are taken as independent; cut from one document they are not.",
    options={
        "permutations": "random exchanges of domains between samples",
        "min_tokens": "tokens a domain must have",
        "seed": "seed of the permutations",
    },
)
def specialisation(
    trace: RoutingTrace, *, permutations: int = 200, min_tokens: int = 200, seed: int = 0
) -> Result:
    """Measure how much the choice of an expert tells about the domain (a language, say).

    The null exchanges domains between whole samples, since tokens of one sample are not
    independent. `p` is that of the layer's mutual information. Specialists are pairs of expert and
    domain whose nPMI exceeds 95 % of the largest nPMI anywhere in the layer under the null. Domains
    with too little text are left out; raises UserError where fewer than two remain.
    """
    check_filled(trace)
    names, notes = compared_domains(trace, min_tokens)
    groups = len(names)
    number = np.array([names.index(name) if name in names else -1 for name in trace.domains])
    labels = number[sample_domains(trace)]
    kept = labels >= 0
    labels = labels[kept]
    random = np.random.default_rng(derive_seed(seed, "specialisation"))
    shuffled = np.stack([random.permutation(labels) for _ in range(permutations)])
    rows, matrices, specialists = [], [], []
    for position, layer in enumerate(trace.layers):
        usage = usage_by_sample(trace, position)[kept]
        joint = _by_domain(usage, labels[None], groups)[0]
        bits = float(mutual_information(joint))
        null_bits, null_largest = _null(usage, shuffled, groups)
        pointwise = npmi(joint)
        matrices.append(pointwise)
        found = _specialists(pointwise, float(np.quantile(null_largest, 0.95)), names)
        specialists.append(found)
        strongest = found[0] if found else None
        rows.append(
            (
                layer.index,
                bits,
                float(null_bits.mean()),
                float(p_value(bits, null_bits)),
                len(found),
                f"{strongest['expert']} {strongest['domain']}" if strongest else "",
                strongest["npmi"] if strongest else float("nan"),
            )
        )
    return Result(
        ("layer", "bits", "chance", "p", "specialists", "strongest", "npmi"),
        rows,
        {
            "mean_bits_above_chance": float(np.mean([row[1] - row[2] for row in rows])),
            "significant_layers": sum(row[3] <= 0.05 for row in rows),
            "layers": len(rows),
            "permutations": permutations,
        },
        {"domains": names, "npmi": matrices, "specialists": specialists},
        notes,
    )


def _by_domain(
    usage: NDArray[np.int64], labels: NDArray[np.int64], groups: int
) -> NDArray[np.float64]:
    """Counts [P, G, E] of P labellings [P, S] of the samples."""
    member = (labels[:, None, :] == np.arange(groups)[None, :, None]).astype(np.float64)
    counts = member.reshape(-1, member.shape[-1]) @ usage.astype(np.float64)
    return counts.reshape(len(labels), groups, -1)


def _null(
    usage: NDArray[np.int64], shuffled: NDArray[np.int64], groups: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mutual information and largest nPMI of every permutation, [P] each."""
    step = max(1, 2**23 // (groups * usage.shape[0]))
    bits, largest = [], []
    for start in range(0, len(shuffled), step):
        joint = _by_domain(usage, shuffled[start : start + step], groups)
        bits.append(mutual_information(joint))
        largest.append(npmi(joint).max((-2, -1)))
    return np.concatenate(bits), np.concatenate(largest)


def _specialists(
    pointwise: NDArray[np.float64], threshold: float, domains: list[str]
) -> list[dict[str, int | float | str]]:
    """Pairs above the threshold, strongest first."""
    domain, expert = np.nonzero(pointwise > threshold + 1e-12)
    order = np.argsort(-pointwise[domain, expert], kind="stable")
    return [
        {"expert": int(e), "domain": domains[d], "npmi": float(pointwise[d, e])}
        for d, e in zip(domain[order], expert[order], strict=True)
    ]
