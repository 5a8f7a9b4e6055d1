"""How far every language routes from a reference language, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from moekit.analyze.information import jensen_shannon, p_value, spearman
from moekit.analyze.reading import (
    check_domain,
    check_filled,
    compared_domains,
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
    "language-divergence",
    title="Divergence of each language's routing from a reference language, by layer",
    paper="Multilingual Routing 2510.04694",
    needs=("trace",),
    limits="The paper's exact divergence is not known to us; this is Jensen-Shannon's.",
    options={
        "reference": "the domain that the others are compared with",
        "losses": "loss by language, to correlate with the divergence",
        "permutations": "random exchanges of sentences with the reference",
        "min_tokens": "tokens a language must have",
        "seed": "seed of the permutations",
    },
)
def language_divergence(
    trace: RoutingTrace,
    *,
    reference: str = "en",
    losses: Mapping[str, float] | None = None,
    permutations: int = 100,
    min_tokens: int = 200,
    seed: int = 0,
) -> Result:
    """Measure the Jensen-Shannon divergence (bits) between profiles of languages.

    Domains are the languages; a profile is the mean over sentences of the share of tokens that
    chose each expert. Sentences count as parallel, the i-th of one with the i-th of the other,
    where two languages have equally many; the null then exchanges within pairs. The divergence has
    its null's mean taken off, which is what two halves of one language would show. `u_shape` is the
    first and last third of the layers minus the middle one: above 0 where the middle is shared.
    Languages with too little text are left out; raises UserError where the reference or all others
    are.
    """
    check_filled(trace)
    check_domain(trace, reference, min_tokens)
    names, notes = compared_domains(trace, min_tokens)
    members = {
        name: np.nonzero(
            (sample_domains(trace) == trace.domains.index(name)) & (sample_lengths(trace) > 0)
        )[0]
        for name in names
    }
    english = members.pop(reference)
    parallel = {name: len(own) == len(english) for name, own in members.items()}
    excess, p_values = [], []
    for position, layer in enumerate(trace.layers):
        usage = usage_by_sample(trace, position)
        lengths = np.maximum(sample_lengths(trace), 1)[:, None]
        profiles = usage / lengths
        row, ps = [], []
        for number, (name, own) in enumerate(members.items()):
            random = np.random.default_rng(
                derive_seed(seed, f"language-divergence {number}", layer.index)
            )
            found, null = _against(
                profiles[english], profiles[own], parallel[name], permutations, random
            )
            row.append(found - null.mean())
            ps.append(float(p_value(found, null)))
        excess.append(row)
        p_values.append(ps)
    table = [
        (layer.index, *row, max(ps))
        for layer, row, ps in zip(trace.layers, excess, p_values, strict=True)
    ]
    depth = np.array(excess)
    by_language = dict(zip(members, depth.mean(0).tolist(), strict=True))
    summary = {"reference": reference, "u_shape": _u_shape(depth.mean(1)), **by_language}
    if losses:
        summary |= _correlation(depth, list(members), losses, permutations, seed)
    notes += [f"{name}: not parallel" for name, equal in parallel.items() if not equal]
    return Result(
        ("layer", *members, "largest p"),
        table,
        summary,
        {"languages": list(members), "p": p_values, "parallel": parallel},
        notes,
    )


def _against(
    first: Array, second: Array, parallel: bool, permutations: int, random: np.random.Generator
) -> tuple[float, Array]:
    """The divergence of the mean profiles of two sets of sentences [S, E], and its null [P]."""
    found = _divergence(first.mean(0), second.mean(0))
    both = np.concatenate([first, second])
    null = np.empty(permutations)
    for number in range(permutations):
        if parallel:
            swap = random.random(len(first)) < 0.5
            order = np.arange(len(both))
            order[: len(first)][swap] += len(first)
            order[len(first) :][swap] -= len(first)
        else:
            order = random.permutation(len(both))
        mixed = both[order]
        null[number] = _divergence(mixed[: len(first)].mean(0), mixed[len(first) :].mean(0))
    return found, null


def _divergence(first: Array, second: Array) -> float:
    if not first.any() or not second.any():
        return 0.0
    return float(jensen_shannon(first, second))


def _u_shape(by_layer: Array) -> float:
    third = len(by_layer) // 3
    if not third:
        return float("nan")
    ends = np.concatenate([by_layer[:third], by_layer[-third:]])
    return float(ends.mean() - by_layer[third:-third].mean())


def _correlation(
    depth: Array, languages: list[str], losses: Mapping[str, float], permutations: int, seed: int
) -> dict[str, float]:
    """Rank correlation of the middle layers' divergence with the losses, and its p."""
    known = [number for number, name in enumerate(languages) if name in losses]
    third = len(depth) // 3
    middle = depth[third : len(depth) - third].mean(0)[known]
    values = np.array([losses[languages[number]] for number in known], dtype=np.float64)
    if len(known) < 3:
        return {"loss_correlation": float("nan"), "loss_languages": len(known)}
    found = spearman(middle, values)
    random = np.random.default_rng(derive_seed(seed, "language-divergence losses"))
    null = np.array([spearman(middle, random.permutation(values)) for _ in range(permutations)])
    return {
        "loss_correlation": found,
        "loss_p": float(p_value(abs(found), np.abs(null))),
        "loss_languages": len(known),
    }
