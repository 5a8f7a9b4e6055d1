"""Experts that create a model's massive activations, and the attention sinks that lean on them.

Shapes: T tokens, D width, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moekit.analyze.attention_sink import attention_sink
from moekit.analyze.rerun import samples_of
from moekit.analyze.result import Result
from moekit.core.layer import MoELayer
from moekit.core.registry import register
from moekit.core.routing_rule import Routing
from moekit.core.trace import RoutingTrace
from moekit.core.view import MoEView
from moekit.profile.experts_run import ExpertRows, run_routed
from moekit.profile.residual import decoder_layer

Array = NDArray[np.float64]


@dataclass
class Peaks:
    """The largest absolute values of a run, per MoE layer and expert.

    `output` and `place` map a layer's position to [E]: the largest |output| of each expert before
    the gate weight, and the place of that token in its sample (-1: never ran). `before` and `after`
    hold the largest |hidden state| of every token around the decoder layer.
    """

    output: dict[int, Array] = field(default_factory=dict)
    place: dict[int, NDArray[np.int64]] = field(default_factory=dict)
    before: dict[int, list[Tensor]] = field(default_factory=dict)
    after: dict[int, list[Tensor]] = field(default_factory=dict)

    def see(self, layer: MoELayer, rows: ExpertRows) -> None:
        """Take in the tokens of one expert; the batch is one whole sample."""
        peak, row = rows.output.abs().amax(-1).max(0)
        if float(peak) > self.output[layer.position][rows.expert]:
            self.output[layer.position][rows.expert] = float(peak)
            self.place[layer.position][rows.expert] = int(rows.tokens[row])


@register(
    "measure",
    "super-experts",
    title="Experts whose down projection makes massive activations, and their attention sinks",
    paper="Super Experts 2507.23279",
    needs=("trace", "weights"),
    limits="Beyond the paper's rule an expert must stand out from the median expert and its layer "
    "must make massive activations; without these guards every model would have one.",
    options={
        "percentile": "an expert's peak must exceed this percentile of all experts' peaks",
        "share_of_largest": "and this share of the largest peak",
        "over_median": "and so many times the median expert's peak",
        "massive": "a layer makes massive activations where the largest token's peak is so many "
        "times the median token's",
        "top": "experts to list, largest peak first",
        "max_tokens": "tokens of the trace to run again, in whole samples spread evenly",
        "sinks": "measure the attention to the first token with and without the super experts",
    },
)
def super_experts(
    trace: RoutingTrace,
    view: MoEView,
    *,
    percentile: float = 99.5,
    share_of_largest: float = 0.1,
    over_median: float = 10.0,
    massive: float = 10.0,
    top: int = 10,
    max_tokens: int = 4096,
    sinks: bool = True,
) -> Result:
    """Run the model on the trace's tokens and find the experts behind massive activations.

    `peak` is an expert's largest |output| before its gate weight and `place` where in its sample
    that token is; `down` is the largest |weight| of its down projection over the layer's median
    expert's. A layer `forms` massive activations where the largest token's peak in the residual
    stream at least doubles and exceeds the median token's `massive` times. `sink` is the mean
    attention to the first token (equal attention: `sink_uniform`), `sink_decay` the share of it
    lost when the super experts are skipped. Raises UserError for a trace of another model or
    without token ids.
    """
    samples = [ids for ids, _ in samples_of(trace, view, max_tokens)]
    peaks = measure_peaks(view, samples)
    ran = np.concatenate([value[value >= 0] for value in peaks.output.values()])
    median, largest = float(np.median(ran)), float(ran.max())
    floor = max(
        over_median * median, share_of_largest * largest, float(np.percentile(ran, percentile))
    )
    forming = {layer.position: _forms(peaks, layer.position, massive) for layer in view}
    found = {
        (position, int(expert))
        for position, value in peaks.output.items()
        for expert in np.nonzero(value > floor)[0]
        if forming[position]["forms"]
    }
    summary: dict[str, Any] = {
        "tokens": sum(map(len, samples)),
        "super_experts": len(found),
        "largest_over_median": largest / median if median else float("nan"),
        "forming_layers": sum(bool(row["forms"]) for row in forming.values()),
        "largest_token_over_median": max(float(row["ratio"]) for row in forming.values()),
    }
    notes: list[str] = []
    sink = attention_sink(view, samples) if sinks else None
    if sink is not None:
        summary |= {"sink": sink.strength, "sink_uniform": sink.uniform}
    elif sinks:
        notes.append("no sinks measured: the model shows no attention, or samples are short")
    if sink is not None and found:
        with skipped(view, found):
            without = attention_sink(view, samples)
        assert without is not None
        summary["sink_decay"] = 1 - without.strength / max(sink.strength, 1e-12)
    return Result(
        ("layer", "expert", "peak", "over median", "down", "place", "super"),
        _listed(view, peaks, found, top, median),
        summary,
        {
            "layers": [{"layer": view[p].index, **row} for p, row in forming.items()],
            "peaks": [peaks.output[p] for p in sorted(peaks.output)],
            "super_experts": sorted((view[p].index, e) for p, e in found),
        },
        notes,
    )


def _listed(
    view: MoEView, peaks: Peaks, found: set[tuple[int, int]], top: int, median: float
) -> list[tuple[Any, ...]]:
    """The experts with the largest peaks, at least all that were found."""
    ranked = sorted(
        (-float(peak), position, expert)
        for position, values in peaks.output.items()
        for expert, peak in enumerate(values)
        if peak >= 0
    )
    return [
        (
            view[position].index,
            expert,
            -peak,
            -peak / median if median else float("nan"),
            _down_outlier(view[position], expert),
            int(peaks.place[position][expert]),
            (position, expert) in found,
        )
        for peak, position, expert in ranked[: max(top, len(found))]
    ]


def measure_peaks(view: MoEView, samples: list[list[int]]) -> Peaks:
    """Run the samples one by one and note the peaks of experts and hidden states."""
    peaks = Peaks()
    device = next(view.model.parameters()).device
    for layer in view:
        peaks.output[layer.position] = np.full(layer.num_choices, -1.0)
        peaks.place[layer.position] = np.full(layer.num_choices, -1)
    with torch.inference_mode(), _watched(view, peaks):
        for ids in samples:
            view.model(input_ids=torch.tensor([ids], device=device), use_cache=False)
    return peaks


@contextmanager
def skipped(view: MoEView, experts: set[tuple[int, int]]) -> Iterator[None]:
    """Run nothing where one of these (position, expert) is chosen; other weights stay as they are.

    This is the paper's ablation, unlike a ban, which lets the router choose another expert.
    """
    by_layer: dict[int, list[int]] = {}
    for position, expert in experts:
        by_layer.setdefault(position, []).append(expert)

    def drop(layer: MoELayer, routing: Routing, hidden: Tensor) -> Routing:
        gone = torch.tensor(by_layer[layer.position], device=routing.ids.device)
        hit = torch.isin(routing.ids, gone)
        return Routing(
            routing.logits, routing.weights.masked_fill(hit, 0), routing.ids.masked_fill(hit, -1)
        )

    with view.transform_routing(drop, on="selection", layers=sorted(by_layer)):
        yield


@contextmanager
def _watched(view: MoEView, peaks: Peaks) -> Iterator[None]:
    def backend(layer: MoELayer, _: nn.Module, hidden: Tensor, ids: Any, weights: Any) -> Tensor:
        return run_routed(layer, hidden, ids, weights, partial(peaks.see, layer))

    def around(position: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given = args[0] if args else kwargs.get("hidden_states")
        made = output[0] if isinstance(output, tuple) else output
        for value, into in ((given, peaks.before), (made, peaks.after)):
            if isinstance(value, Tensor):
                into.setdefault(position, []).append(_token_peaks(value))

    with ExitStack() as stack:
        for layer in view:
            watched = decoder_layer(view.model, layer)
            hook = watched.register_forward_hook(partial(around, layer.position), with_kwargs=True)
            stack.callback(hook.remove)
            stack.enter_context(view.use_backend(partial(backend, layer), [layer.position]))
        yield


def _token_peaks(hidden: Tensor) -> Tensor:
    """The largest absolute value of every token [T] of one sample, hidden [1, T, ...]."""
    return hidden[0].flatten(1).abs().amax(-1).float().cpu()


def _forms(peaks: Peaks, position: int, massive: float) -> dict[str, Any]:
    """Whether a layer makes massive activations, with the numbers that say so."""
    if position not in peaks.after or position not in peaks.before:
        return {"before": None, "after": None, "ratio": float("nan"), "forms": False}
    before, after = torch.cat(peaks.before[position]), torch.cat(peaks.after[position])
    top, earlier = float(after.max()), float(before.max())
    ratio = top / max(float(after.median()), 1e-12)
    forms = ratio >= massive and top >= 2 * earlier
    return {"before": earlier, "after": top, "ratio": ratio, "forms": forms}


def _down_outlier(layer: MoELayer, expert: int) -> float:
    """The largest |weight| of an expert's down projection over the median expert's largest."""
    if expert >= layer.num_experts:
        return float("nan")
    largest = [float(layer.expert_views(e).down.abs().max()) for e in range(layer.num_experts)]
    return largest[expert] / max(float(np.median(largest)), 1e-12)
