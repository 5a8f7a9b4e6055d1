"""Experts that fire with marker tokens, such as those around a model's thinking."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moekit.analyze.information import p_value
from moekit.analyze.reading import Ids, check_filled, read_ids
from moekit.analyze.result import Result
from moekit.core.errors import UserError
from moekit.core.registry import register
from moekit.core.seeds import derive_seed
from moekit.core.trace import RoutingTrace

Array = NDArray[np.float64]


@register(
    "measure",
    "cognitive-experts",
    title="Experts by nPMI with marker tokens, beside control tokens of the same frequency",
    paper="RICE 2505.14681",
    needs=("trace",),
    limits="It only measures; a marker's experts may follow its identity, which controls show.",
    options={
        "markers": "token ids of the markers",
        "top": "experts to report",
        "controls": "control tokens, and random places, to compare with",
        "seed": "seed of the random places",
    },
)
def cognitive_experts(
    trace: RoutingTrace,
    *,
    markers: Sequence[int],
    top: int = 10,
    controls: int = 50,
    seed: int = 0,
) -> Result:
    """Rank all experts of all layers by their mean nPMI with the marker tokens.

    `p_random` is the chance that as many random places have an expert with as large a value, and
    `p_control` the share of other tokens, of the frequency nearest to the markers', that do: a
    large `p_control` says that any token has such experts. Raises UserError where no marker or no
    other token occurs.
    """
    check_filled(trace)
    tokens = trace.tokens.numpy()
    places = [np.nonzero(tokens == marker)[0] for marker in markers]
    missing = [int(m) for m, found in zip(markers, places, strict=True) if not len(found)]
    if missing or not places:
        raise UserError(
            f"markers {missing or list(markers)} do not occur in the trace's {len(tokens)} tokens"
        )
    counts = [len(found) for found in places]
    random = np.random.default_rng(derive_seed(seed, "cognitive-experts"))
    drawn = [[random.choice(len(tokens), n, False) for n in counts] for _ in range(controls)]
    others = _controls(tokens, markers, counts, controls)
    sets = [places, *drawn, *([np.nonzero(tokens == t)[0] for t in row] for row in others)]
    scores = [_mean_npmi(trace, position, sets) for position in range(len(trace.layers))]
    found = [row[0] for row in scores]
    largest = np.max([row.max(1) for row in scores], axis=0)
    best = float(largest[0])
    ranked = sorted(
        (
            (float(value), position, expert)
            for position, row in enumerate(found)
            for expert, value in enumerate(row)
        ),
        reverse=True,
    )[:top]
    return Result(
        ("layer", "expert", "npmi"),
        [(trace.layers[position].index, expert, value) for value, position, expert in ranked],
        {
            "occurrences": counts,
            "largest": best,
            "p_random": float(p_value(best, largest[1 : 1 + controls])),
            "p_control": float(p_value(best, largest[1 + controls :])),
            "controls": len(others),
        },
        {"npmi": found},
    )


def _controls(tokens: Ids, markers: Sequence[int], counts: list[int], number: int) -> list[Ids]:
    """Rows of other token ids whose frequencies are nearest to those of each marker."""
    values, frequency = np.unique(tokens[tokens >= 0], return_counts=True)
    other = ~np.isin(values, np.asarray(markers))
    values, frequency = values[other], frequency[other]
    if not len(values):
        raise UserError("the trace has no tokens but the markers: nothing to compare with")
    order = [np.argsort(np.abs(np.log(frequency / count)), kind="stable") for count in counts]
    return [
        np.array([values[nearest[i]] for nearest in order]) for i in range(min(number, len(values)))
    ]


def _mean_npmi(trace: RoutingTrace, position: int, sets: list[list[Ids]]) -> Array:
    """nPMI of every expert with every set of places, averaged over its members, [sets, E]."""
    num_experts = trace.layers[position].num_experts
    ids = read_ids(trace, position)
    everywhere = _count(ids, num_experts) / len(ids)
    values = []
    for row in sets:
        joints = [_count(ids[places], num_experts) / len(ids) for places in row]
        parts = [
            _npmi(joint, len(places) / len(ids), everywhere)
            for joint, places in zip(joints, row, strict=True)
        ]
        values.append(np.mean(parts, axis=0))
    return np.array(values)


def _count(ids: Ids, num_experts: int) -> Array:
    return np.bincount(ids[ids >= 0], minlength=num_experts).astype(np.float64)


def _npmi(joint: Array, marker: float, expert: Array) -> Array:
    """nPMI of the events "the token is the marker" and "the expert is among its K"."""
    met = (joint > 0) & (joint < 1)
    expected = np.where(met, marker * expert, 1)
    safe = np.where(met, joint, 0.5)
    value = np.log(safe / expected) / -np.log(safe)
    return np.where(met, value, np.where((joint == 0) & (expert > 0), -1.0, 0.0))
