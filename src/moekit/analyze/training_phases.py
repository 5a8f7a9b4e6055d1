"""The course of balance over training: surge, stabilisation, relaxation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moekit.analyze.congestion import congestion
from moekit.analyze.load import load
from moekit.analyze.result import Result
from moekit.core.errors import UserError
from moekit.core.registry import register
from moekit.core.trace import RoutingTrace

Array = NDArray[np.float64]

# A rise or fall counts as one when it exceeds so many times the noise and this share of the peak.
TIMES_NOISE = 4.0
LEAST_SHARE = 0.15


@register(
    "measure",
    "training-phases",
    title="Congestion and load over training, and whether they show three phases",
    paper="Three Phases of Expert Routing 2604.04230",
    needs=("trace", "training"),
    options={"quality": "what an expert is worth: 'logit', 'gate', or 'auto'"},
)
def training_phases(traces: Sequence[RoutingTrace], *, quality: str = "auto") -> Result:
    """Fit the congestion coefficient to the probe traces of a training run, in order of step.

    The paper sees it surge, stay, and relax. A phase is found where the course rises from its start
    or falls to its end by more than its own noise and 15 % of its peak; the plateau is the steps
    between, within a tenth of the way from the peak. Raises UserError for fewer than 5 probes or
    probes without a step.
    """
    steps = steps_of(traces)
    if len(traces) < 5:
        raise UserError(f"{len(traces)} probe traces show no phases: 5 steps or more are needed")
    gammas, table = [], []
    for step, trace in zip(steps, traces, strict=True):
        fitted, balance = congestion(trace, quality=quality), load(trace)
        gammas.append(fitted.column("gamma"))
        table.append(
            (
                step,
                fitted.summary["gamma"],
                balance.summary["mean_imbalance"],
                balance.summary["mean_entropy"],
                balance.summary["dead_experts"],
            )
        )
    course = np.array([row[1] for row in table])
    phases = find_phases(np.array(steps, dtype=np.float64), course)
    return Result(
        ("step", "gamma", "imbalance", "entropy", "dead"),
        table,
        phases,
        {"layers": [layer.index for layer in traces[0].layers], "gamma": gammas},
    )


def steps_of(traces: Sequence[RoutingTrace]) -> list[int]:
    """The training steps of probe traces; UserError where they are missing or not ascending."""
    steps = [trace.header.metadata.get("step") for trace in traces]
    if not all(isinstance(step, int) for step in steps):
        raise UserError(
            "these traces are no probes of a training run: their metadata has no step; give the "
            "probes directory that `moekit train` writes"
        )
    found = [int(step) for step in steps if isinstance(step, int)]
    if sorted(set(found)) != found:
        raise UserError(f"the probe traces' steps are not ascending: {found[:8]}")
    return found


def find_phases(steps: Array, course: Array) -> dict[str, float | bool]:
    """Which of the phases the course of gamma shows, and at which steps they end and begin."""
    known = np.isfinite(course)
    steps, course = steps[known], course[known]
    if len(course) < 5:
        return {"three_phases": False, "known_steps": len(course)}
    smooth = np.array([np.median(course[max(i - 1, 0) : i + 2]) for i in range(len(course))])
    # Second differences of a smooth course are noise: their variance is 6 times that of a value.
    noise = float(np.sqrt(np.mean(np.diff(course, 2) ** 2) / 6))
    top = int(smooth.argmax())
    peak, first, last = float(smooth[top]), float(smooth[0]), float(smooth[-1])
    least = max(TIMES_NOISE * noise, LEAST_SHARE * abs(peak))
    surge, relaxation = peak - first > least, peak - last > least
    near_rise = np.nonzero(smooth >= peak - 0.1 * max(peak - first, 0))[0]
    near_fall = np.nonzero(smooth >= peak - 0.1 * max(peak - last, 0))[0]
    start = steps[near_rise[0]] if surge else steps[0]
    stop = steps[near_fall[-1]] if relaxation else steps[-1]
    return {
        "surge": bool(surge),
        "relaxation": bool(relaxation),
        "three_phases": bool(surge and relaxation),
        "peak": peak,
        "peak_step": float(steps[top]),
        "plateau_from": float(start),
        "plateau_to": float(stop),
        "noise": noise,
    }
