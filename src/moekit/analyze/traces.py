"""Which traces an analysis is about: found on disk, joined, or in order of training step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from moekit.core.errors import UserError
from moekit.core.spec import MoESpec
from moekit.core.trace import RoutingTrace
from moekit.core.trace_files import HEADER, TraceHeader
from moekit.core.trace_import import import_traces, is_recorded


def open_traces(paths: Sequence[str | Path], spec: MoESpec | None = None) -> list[RoutingTrace]:
    """Open traces, and those directly inside a directory that is none, by name.

    Routing that another server recorded (see `core.trace_import`) needs the model's `spec`. Raises
    UserError for a path without a trace, and for traces of different models.
    """
    traces = []
    for path in map(Path, paths):
        if is_recorded(path):
            if spec is None:
                raise UserError(f"{path} does not tell its model: give --model")
            traces.append(import_traces([path], spec))
            continue
        if (path / HEADER).is_file() or not path.is_dir():
            traces.append(RoutingTrace.open(path))
            continue
        # A training run keeps its probes one directory further down.
        folder = path / "probes" if (path / "probes").is_dir() else path
        inside = sorted(
            p.parent for p in folder.glob(f"*/{HEADER}") if p.parent.suffix != ".partial"
        )
        if not inside:
            raise UserError(f"{path} is no trace and holds none (no {HEADER} in it or below it)")
        traces += [RoutingTrace.open(p) for p in inside]
    for trace in traces[1:]:
        _check_alike(traces[0], trace)
    return traces


def in_order_of_training(traces: Sequence[RoutingTrace]) -> list[RoutingTrace] | None:
    """The traces by their training step; None unless there are several and each has one."""
    steps = [trace.header.metadata.get("step") for trace in traces]
    if len(traces) < 2 or not all(isinstance(step, int) for step in steps):
        return None
    order = sorted(range(len(traces)), key=lambda number: int(steps[number] or 0))
    return [traces[number] for number in order]


def joined(traces: Sequence[RoutingTrace]) -> RoutingTrace:
    """One trace of all samples, in order, read from where they are."""
    if len(traces) == 1:
        return traces[0]
    domains = list(dict.fromkeys(name for trace in traces for name in trace.domains))
    header: TraceHeader = replace(
        traces[0].header,
        lengths=[n for trace in traces for n in trace.header.lengths],
        sample_domains=[
            domains.index(trace.domains[number])
            for trace in traces
            for number in trace.header.sample_domains
        ],
        domains=domains,
        logits=all(trace.header.logits for trace in traces),
    )
    return RoutingTrace(header, [chunk for trace in traces for chunk in trace.chunks])


def _check_alike(first: RoutingTrace, other: RoutingTrace) -> None:
    shapes = [
        [(layer.index, layer.num_experts, layer.top_k) for layer in trace.layers]
        for trace in (first, other)
    ]
    kinds = [trace.header.model_type for trace in (first, other)]
    if shapes[0] != shapes[1] or kinds[0] != kinds[1]:
        raise UserError(
            "the traces are of different models: "
            + " and ".join(
                f"{kind or 'unknown'} with {len(shape)} MoE layers"
                + (f" of {shape[0][1]} experts" if shape else "")
                for kind, shape in zip(kinds, shapes, strict=True)
            )
        )
