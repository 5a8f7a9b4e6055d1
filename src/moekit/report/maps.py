"""Heat maps and flows: load, domains, transitions between layers, similarity of experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moekit.analyze import Result
from moekit.analyze.information import mutual_information
from moekit.report.dendrogram import branches, leaf_order
from moekit.report.figure import (
    DOWNWARDS,
    HEAT_MARGIN,
    TIMES,
    Figure,
    Key,
    View,
    axis,
    heat,
    label,
    marks,
)
from moekit.report.usage import Usage

FLOW_LAYERS, FLOW_LINKS = 6, 8


def load_map(usage: Usage) -> Figure:
    """Load of every expert over its even share, by layer: in order of number, and of load."""
    views = [_load_view(usage, False), _load_view(usage, True)]
    height = 70 + max(18, min(34, 640 // len(usage.layers))) * len(usage.layers)
    key = Key("around", "tokens, over an even share", TIMES)
    return Figure("Load of every expert by layer", views, height, "order", key=key)


def _load_view(usage: Usage, by_load: bool) -> View:
    width = usage.num_experts
    z: list[list[float | None]] = []
    custom, dead_x, dead_y = [], [], []
    names = [f"layer {index}" for index in usage.layers]
    for name, load in zip(names, usage.load, strict=True):
        order = np.argsort(-load, kind="stable") if by_load else np.arange(len(load))
        even = max(load.mean(), 1e-12)
        row: list[float | None] = []
        details = []
        for place, expert in enumerate(order.tolist()):
            times = float(load[expert] / even)
            row.append(round(float(np.log2(max(times, 2**-6))), 3))
            details.append([expert, round(times, 2), int(load[expert])])
            if not load[expert]:
                dead_x.append(place)
                dead_y.append(name)
        missing = width - len(row)
        z.append(row + [None] * missing)
        custom.append(details + [[None, None, None]] * missing)
    hover = (
        "%{y}, expert %{customdata[0]}<br>%{customdata[1]}× its even share"
        "<br>%{customdata[2]} tokens"
    )
    trace = heat(
        z,
        range(width),
        names,
        hover,
        scale="around",
        low=-3,
        high=3,
        custom=custom,
    )
    data = [trace]
    if dead_x:
        data.append(marks(dead_x, dead_y, "x-thin", "never chosen"))
    title = "rank by load" if by_load else "expert"
    layout = {"xaxis": axis(title), "yaxis": DOWNWARDS, "margin": HEAT_MARGIN}
    return View("by load" if by_load else "by number", data, layout)


def domain_map(usage: Usage, result: Result | None, what: str) -> Figure:
    """How much more often than on average each expert serves a domain, a view for every layer.

    `what` is what the domains are, in the plural.
    """
    views, strength = [], []
    for position, index in enumerate(usage.layers):
        counts = usage.counts[position].astype(np.float64)
        found = result.detail["specialists"][position] if result is not None else []
        pairs = {(str(item["domain"]), int(item["expert"])) for item in found}
        views.append(_domain_view(usage, index, lift(counts), pairs))
        strength.append(_strength(result, position, counts))
    height = 90 + 24 * len(usage.domains)
    start = int(np.argmax(strength))
    key = Key("around", "chosen, over the average of all text", TIMES)
    return Figure(f"Experts and the {what} they serve", views, height, "layer", start, key)


def _strength(result: Result | None, position: int, counts: NDArray[np.float64]) -> float:
    if result is None:
        return float(mutual_information(counts))
    return float(result.rows[position][1]) - float(result.rows[position][2])


def _domain_view(
    usage: Usage, index: int, times: NDArray[np.float64], found: set[tuple[str, int]]
) -> View:
    # Experts of one domain side by side, so that blocks show.
    order = np.lexsort((-times.max(0), times.argmax(0)))
    names = [label(domain) for domain in usage.domains]
    experts = [str(expert) for expert in order]
    trace = heat(
        np.round(np.log2(np.clip(times[:, order], 2**-3, 2**3)), 2).tolist(),
        experts,
        names,
        "%{y}: expert %{x} is chosen %{customdata}× as often as on average",
        scale="around",
        low=-3,
        high=3,
        custom=np.round(times[:, order], 2).tolist(),
    )
    data = [trace]
    if found:
        # By name: a number would be read as the name of a category too.
        x = [str(expert) for _, expert in sorted(found)]
        y = [names[usage.domains.index(domain)] for domain, _ in sorted(found)]
        data.append(marks(x, y, "circle-open", "significant"))
    layout = {
        # A range of one's own, since rings would widen it by a cell.
        "xaxis": axis("expert", type="category", tickangle=0, range=[-0.5, len(experts) - 0.5]),
        "yaxis": {"type": "category", "range": [len(names) - 0.5, -0.5]},
        "margin": HEAT_MARGIN,
    }
    return View(f"layer {index}", data, layout)


def flow_map(usage: Usage) -> Figure | None:
    """From the experts of one layer to those of the next: the strongest links, then each pair."""
    pairs = [(position, flow) for position, flow in enumerate(usage.flow) if flow is not None]
    if not pairs:
        return None
    views = [_links(usage, pairs)]
    for position, flow in pairs:
        views.append(_transition_view(usage, position, flow))
    key = Key("around", "met, over chance (single layers)", TIMES)
    return Figure("Flow from layer to layer", views, 460, "show", key=key)


def lift(flow: NDArray[np.float64]) -> NDArray[np.float64]:
    """Observed over expected meetings of two experts; 1 where they are independent."""
    total = max(flow.sum(), 1)
    expected = flow.sum(1, keepdims=True) * flow.sum(0, keepdims=True) / total
    return np.divide(flow, expected, out=np.ones_like(flow), where=expected > 0)


def _transition_view(usage: Usage, position: int, flow: NDArray[np.float64]) -> View:
    value = np.log2(np.clip(lift(flow), 2**-3, 2**3))
    first, second = usage.layers[position - 1], usage.layers[position]
    trace = heat(
        np.round(value, 2).tolist(),
        [str(e) for e in range(flow.shape[1])],
        [str(e) for e in range(flow.shape[0])],
        f"layer {first} expert %{{y}} → layer {second} expert %{{x}}"
        "<br>%{customdata}× as often as by chance",
        scale="around",
        low=-3,
        high=3,
        custom=np.round(lift(flow), 2).tolist(),
    )
    layout = {
        "xaxis": axis(f"expert of layer {second}", type="category"),
        "yaxis": {**DOWNWARDS, **axis(f"expert of layer {first}")},
        "margin": HEAT_MARGIN,
    }
    return View(f"layer {first} to {second}", [trace], layout)


def _links(usage: Usage, pairs: list[tuple[int, NDArray[np.float64]]]) -> View:
    """The links that carry most beyond chance, over a run of neighbouring layers."""
    excess = [float(np.clip(_beyond(flow), 0, None).sum()) for _, flow in pairs]
    width = min(FLOW_LAYERS - 1, len(pairs))
    sums = [sum(excess[i : i + width]) for i in range(len(pairs) - width + 1)]
    begin = int(np.argmax(sums))
    shown = pairs[begin : begin + width]
    nodes: dict[tuple[int, int], int] = {}
    source, target, value, custom = [], [], [], []
    for position, flow in shown:
        beyond = _beyond(flow)
        best = np.argsort(-beyond, axis=None, kind="stable")[:FLOW_LINKS]
        for place in best.tolist():
            a, b = divmod(place, flow.shape[1])
            if beyond[a, b] <= 0:
                continue
            source.append(nodes.setdefault((position - 1, a), len(nodes)))
            target.append(nodes.setdefault((position, b), len(nodes)))
            value.append(float(beyond[a, b]))
            custom.append(round(float(lift(flow)[a, b]), 1))
    ends = (usage.layers[shown[0][0] - 1], usage.layers[shown[-1][0]])
    first, last = shown[0][0] - 1, shown[-1][0]
    trace: dict[str, Any] = {
        "type": "sankey",
        "arrangement": "snap",
        "node": {
            "label": [str(expert) for _, expert in nodes],
            "customdata": [usage.layers[p] for p, _ in nodes],
            "x": [0.01 + 0.98 * (p - first) / max(last - first, 1) for p, _ in nodes],
            "y": _heights(list(nodes)),
            "color": "@series1",
            "line": {"width": 0},
            "pad": 10,
            "thickness": 12,
            "hovertemplate": "layer %{customdata}, expert %{label}<extra></extra>",
        },
        "link": {
            "source": source,
            "target": target,
            "value": value,
            "customdata": custom,
            "color": "@link",
            "hovertemplate": "expert %{source.label} → %{target.label}<br>%{customdata}× as often "
            "as by chance<extra></extra>",
        },
    }
    heads = [
        {
            "text": f"layer {usage.layers[p]}",
            "x": (p - first) / max(last - first, 1),
            "xanchor": "left" if p == first else "right" if p == last else "center",
            "y": 1.02,
            "yanchor": "bottom",
            "xref": "paper",
            "yref": "paper",
            "showarrow": False,
            "font": {"size": 11, "color": "@soft"},
        }
        for p in range(first, last + 1)
    ]
    layout = {"margin": {"t": 28, "b": 12, "l": 4, "r": 4}, "annotations": heads}
    return View(f"strongest paths, layers {ends[0]} to {ends[1]}", [trace], layout)


def _beyond(flow: NDArray[np.float64]) -> NDArray[np.float64]:
    """Meetings of two experts beyond those expected by chance."""
    return np.where(flow > 0, flow - flow / np.maximum(lift(flow), 1e-12), 0)


def _heights(nodes: Sequence[tuple[int, int]]) -> list[float]:
    """Places of nodes from top to bottom, spread evenly within their layer."""
    by_layer: dict[int, list[tuple[int, int]]] = {}
    for node in nodes:
        by_layer.setdefault(node[0], []).append(node)
    return [(by_layer[node[0]].index(node) + 0.5) / len(by_layer[node[0]]) for node in nodes]


def peak_map(usage: Usage, result: Result) -> Figure:
    """The largest output of every expert over the median expert's, by layer."""
    peaks = [np.asarray(row, dtype=np.float64) for row in result.detail["peaks"]]
    ran = np.concatenate([row[row >= 0] for row in peaks])
    median = max(float(np.median(ran)), 1e-12)
    names = [f"layer {index}" for index in usage.layers]
    width = max(map(len, peaks))
    z = [
        [
            None if value < 0 else round(float(np.log2(max(value / median, 2**-4))), 3)
            for value in row
        ]
        + [None] * (width - len(row))
        for row in peaks
    ]
    custom = [
        [round(float(value / median), 2) for value in row] + [None] * (width - len(row))
        for row in peaks
    ]
    high = max(4, int(np.ceil(np.log2(max(ran.max() / median, 1)))))
    trace = heat(
        z,
        range(width),
        names,
        "%{y}, expert %{x}<br>largest output %{customdata}× the median expert's",
        scale="more",
        low=0,
        high=high,
        custom=custom,
    )
    found = {(int(layer), int(expert)) for layer, expert in result.detail["super_experts"]}
    stars = [(expert, f"layer {layer}") for layer, expert in sorted(found)]
    data = [trace]
    if stars:
        data.append(marks([x for x, _ in stars], [y for _, y in stars], "circle-open", "super"))
    height = 70 + max(18, min(34, 640 // len(names))) * len(names)
    layout = {"xaxis": axis("expert"), "yaxis": DOWNWARDS, "margin": HEAT_MARGIN}
    steps = range(0, high + 1, max(1, high // 4))
    key = Key("more", "largest output, over the median expert's", tuple(f"{2**p}×" for p in steps))
    return Figure("Largest output of every expert", [View("", data, layout)], height, key=key)


def _log2(value: float) -> float:
    return round(float(np.log2(max(value, 2**-4))), 3)


def similarity_map(result: Result) -> Figure:
    """Dendrograms of the experts of every layer, from the measure `redundancy`."""
    views, closest = [], []
    for index, layer in result.detail["layers"].items():
        tree = np.asarray(layer["linkage"], dtype=np.float64).reshape(-1, 4)
        order = leaf_order(tree)
        x, y = branches(tree, order)
        trace = {
            "type": "scatter",
            "mode": "lines",
            "x": x,
            "y": y,
            "line": {"color": "@series1", "width": 1.5},
            "hovertemplate": "distance %{y:.2f}<extra></extra>",
            "connectgaps": False,
        }
        ticks = {
            "tickvals": list(range(len(order))),
            "ticktext": [str(expert) for expert in order],
            "range": [-0.7, len(order) - 0.3],
        }
        layout = {
            "xaxis": axis("expert", **ticks),
            "yaxis": axis("distance (1 - similarity)", rangemode="tozero"),
        }
        views.append(View(f"layer {index}", [trace], layout))
        closest.append(float(tree[:, 2].min()) if len(tree) else 1.0)
    return Figure("Similar experts", views, 340, "layer", int(np.argmin(closest)))
