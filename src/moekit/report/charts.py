"""Line charts: specialisation by layer, cache curves, pruning, training."""

from __future__ import annotations

from typing import Any

import numpy as np

from moekit.analyze import Result
from moekit.report.facts import Facts
from moekit.report.figure import Figure, View, axis, line
from moekit.report.memory_forecast import MemoryForecast
from moekit.report.pruning import Pruning
from moekit.report.sources import TrainingRun

PERCENT = {"tickformat": ".0%", "rangemode": "tozero"}
POLICIES = {
    "belady": ("best possible (Belady)", "series3", "solid"),
    "lru": ("last use (LRU)", "series1", "solid"),
    "hot-set": ("fixed set of the most used", "series5", "dash"),
}


def layers_axis(layers: list[int]) -> dict[str, Any]:
    """An axis of decoder layers with whole numbers."""
    return axis("layer", tickmode="array", tickvals=layers[:: max(1, len(layers) // 12)])


def information_chart(result: Result, other: Result | None) -> Figure:
    """Bits that an expert tells about the domain (and the language), against chance."""
    layers = result.column("layer")
    hover = "layer %{x}: %{y:.3f} bits"
    data = [line("domain", layers, result.column("bits"), "series1", hover)]
    if other is not None:
        data.append(line("language", layers, other.column("bits"), "series3", hover))
    data.append(
        line("domain, by chance", layers, result.column("chance"), "reference", hover, dash="dot")
    )
    layout = {"xaxis": layers_axis(layers), "yaxis": axis("bits", rangemode="tozero")}
    return Figure("What experts tell about the domain", [View("", data, layout)], 280)


def token_chart(identity: Result | None, prediction: Result | None) -> Figure | None:
    """By layer: experts shared by equal tokens, and experts foretold by the layer before."""
    data = []
    layers: list[int] = []
    if identity is not None:
        layers = identity.column("layer")
        hover = "layer %{x}: %{y:.0%}"
        data.append(
            line("decided by the token", layers, identity.column("token"), "series1", hover)
        )
    if prediction is not None:
        layers = layers or prediction.column("next")
        where, hover = prediction.column("next"), "layer %{x}: %{y:.0%}"
        data.append(
            line("foretold by layer before", where, prediction.column("recall"), "series3", hover)
        )
        data.append(
            line(
                "most used experts",
                where,
                prediction.column("popular"),
                "reference",
                hover,
                dash="dot",
            )
        )
    if not data:
        return None
    layout = {"xaxis": layers_axis(layers), "yaxis": axis("share of experts", **PERCENT)}
    return Figure("What decides the experts, by layer", [View("", data, layout)], 300)


def cache_chart(result: Result, memory: MemoryForecast | None) -> Figure:
    """Demand hits against the share of experts in memory, with the reader's memory."""
    shares = [float(value) for value in result.column("uniform")]
    slots = result.column("slots")
    data = []
    for policy, (name, colour, dash) in POLICIES.items():
        if policy in result.columns:
            trace = line(name, shares, result.column(policy), colour, "", dash=dash)
            trace["customdata"] = slots
            trace["hovertemplate"] = "%{customdata} experts a layer: %{y:.0%} hits<extra></extra>"
            data.append(trace)
    data.append(
        line("uniform routing", [0, 1], [0, 1], "reference", "%{y:.0%}", dash="dot", markers=False)
    )
    layout: dict[str, Any] = {
        "xaxis": axis("experts kept in memory", tickformat=".0%", range=[0, 1.02]),
        "yaxis": axis("there when needed", tickformat=".0%", range=[0, 1.05]),
    }
    if memory is not None and not memory.whole and memory.slots:
        share = memory.slots / memory.num_experts
        layout["shapes"] = [
            {
                "type": "line",
                "x0": share,
                "x1": share,
                "y0": 0,
                "y1": 1,
                "yref": "paper",
                "line": {"color": "@warn", "width": 2, "dash": "dash"},
            }
        ]
        layout["annotations"] = [
            {
                "x": share,
                "y": 0.02,
                "yref": "paper",
                "yanchor": "bottom",
                "xanchor": "left" if share < 0.6 else "right",
                "text": " your memory ",
                "showarrow": False,
                "font": {"color": "@warn"},
            }
        ]
    return Figure("Cache hits against experts in memory", [View("", data, layout)], 340)


def pruning_chart(pruning: Pruning) -> Figure:
    """Contribution lost against experts removed, least contributing first."""
    x = [share for share, _ in pruning.curve]
    y = [lost for _, lost in pruning.curve]
    hover = "%{x:.0%} of experts removed: %{y:.1%} of the contribution lost"
    data = [
        line("least contributing first", x, y, "series1", hover, markers=False),
        line("at random", [0, 1], [0, 1], "reference", hover, dash="dot", markers=False),
    ]
    data[0]["fill"] = "tozeroy"
    data[0]["fillcolor"] = "@wash"
    layout = {
        "xaxis": axis("experts removed from every layer", tickformat=".0%", range=[0, 1]),
        "yaxis": axis("contribution lost", tickformat=".0%", range=[0, 1]),
    }
    return Figure("Contribution lost by pruning", [View("", data, layout)], 300)


def training_charts(run: TrainingRun, facts: Facts) -> list[Figure]:
    """Loss and bits per byte, the routers' imbalance, and agreement with the final routing."""
    figures = []
    hover = "step %{x}: %{y:.3f}"
    losses = [(e["step"], e["loss"]) for e in run.entries if "loss" in e]
    data = []
    if losses:
        data.append(line("loss (nats a token)", *_columns(losses), "series1", hover, markers=False))
    valid = [
        (e["step"], e["valid"]["mean"])
        for e in run.entries
        if isinstance(e.get("valid"), dict) and "mean" in e["valid"]
    ]
    if valid:
        data.append(line("bits per byte, held-out text", *_columns(valid), "series2", hover))
    layout = {"xaxis": axis("step"), "yaxis": axis("", rangemode="tozero")}
    if data:
        figures.append(Figure("Loss over training", [View("", data, layout)], 300))
    balance = _balance(run)
    if balance is not None:
        figures.append(balance)
    course = []
    drift, phases = facts.results.get("routing-drift"), facts.results.get("training-phases")
    if drift is not None:
        drift_course = drift.column("step"), drift.column("agreement")
        course.append(
            View(
                "agreement with the final routing",
                [line("agreement", *drift_course, "series1", "step %{x}: %{y:.0%}")],
                {"xaxis": axis("step"), "yaxis": axis("agreement", **PERCENT)},
            )
        )
    if phases is not None:
        gamma_course = phases.column("step"), phases.column("gamma")
        course.append(
            View(
                "congestion (pressure to spread load)",
                [line("congestion", *gamma_course, "series1", hover)],
                {"xaxis": axis("step"), "yaxis": axis("congestion γ", rangemode="tozero")},
            )
        )
    if course:
        figures.append(Figure("Routing over training", course, 300, "show"))
    return figures


def _balance(run: TrainingRun) -> Figure | None:
    entries = [e for e in run.entries if isinstance(e.get("routers"), dict)]
    entries = [e for e in entries if e["routers"].get("imbalance")]
    if not entries:
        return None
    steps = [e["step"] for e in entries]
    values = [np.asarray(e["routers"]["imbalance"], dtype=np.float64) for e in entries]
    hover = "step %{x}: %{y:.2f}×"
    data = [
        line(
            "most uneven layer",
            steps,
            [float(v.max()) for v in values],
            "series2",
            hover,
            markers=False,
        ),
        line(
            "mean of layers",
            steps,
            [float(v.mean()) for v in values],
            "series1",
            hover,
            markers=False,
        ),
    ]
    layout = {
        "xaxis": axis("step"),
        "yaxis": axis("busiest expert over even share", rangemode="tozero"),
    }
    return Figure("Balance over training", [View("", data, layout)], 300)


def _columns(pairs: list[tuple[Any, Any]]) -> tuple[list[Any], list[Any]]:
    return [x for x, _ in pairs], [y for _, y in pairs]
