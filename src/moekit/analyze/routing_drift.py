"""When routing becomes what it stays: agreement of checkpoints on the same tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moekit.analyze.reading import multi_hot, read_ids
from moekit.analyze.result import Result
from moekit.analyze.training_phases import steps_of
from moekit.core.errors import UserError
from moekit.core.registry import register
from moekit.core.trace import RoutingTrace


@register(
    "measure",
    "routing-drift",
    title="Share of choices that checkpoints have in common with the last one",
    paper="OpenMoE 2402.01739",
    needs=("trace", "training"),
)
def routing_drift(traces: Sequence[RoutingTrace]) -> Result:
    """Compare every probe's choices with the last probe's, token by token.

    `agreement` is (share - chance) / (1 - chance), chance being what the two checkpoints' loads
    would share if they were independent; `previous` is the same with the probe before. `settled`
    is the first step from which agreement stays above 0.8. Raises UserError for one probe, and for
    probes of different text.
    """
    steps = steps_of(traces)
    if len(traces) < 2:
        raise UserError("one probe trace shows no drift: give two steps or more")
    tokens = traces[-1].tokens
    for step, trace in zip(steps, traces, strict=True):
        if len(trace) != len(tokens) or (trace.tokens != tokens).any():
            raise UserError(f"the probe of step {step} is of other text than the last one")
    by_layer = np.full((len(traces), len(traces[0].layers), 2), np.nan)
    for position, layer in enumerate(traces[0].layers):
        last = multi_hot(read_ids(traces[-1], position), layer.num_experts)
        before = None
        for number, trace in enumerate(traces):
            here = multi_hot(read_ids(trace, position), layer.num_experts)
            by_layer[number, position, 0] = _agreement(here, last)
            if before is not None:
                by_layer[number, position, 1] = _agreement(here, before)
            before = here
    agreement = by_layer[:, :, 0].mean(1)
    table = [
        (step, float(agreement[number]), float(by_layer[number, :, 1].mean()))
        for number, step in enumerate(steps)
    ]
    below = np.nonzero(agreement < 0.8)[0]
    settled = steps[below[-1] + 1] if len(below) else steps[0]
    return Result(
        ("step", "agreement", "previous"),
        table,
        {"settled": settled, "first_agreement": float(agreement[0])},
        {"agreement": by_layer[:, :, 0]},
    )


def _agreement(first: np.ndarray, second: np.ndarray) -> float:
    width = max(float(second.sum()), 1.0)
    share = float((first * second).sum()) / width
    chance = float((first.mean(0) * second.sum(0)).sum()) / width
    return (share - chance) / (1 - chance) if chance < 1 - 1e-9 else float("nan")
