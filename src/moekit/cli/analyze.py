"""`moekit analyze`."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moekit.cli.common import (
    Dtype,
    DtypeOption,
    JsonOption,
    Output,
    SeedOption,
    ThreadsOption,
    check_out,
    output,
    progress,
)
from moekit.core.errors import UserError

if TYPE_CHECKING:
    from moekit.analyze import Analysis, Result
    from moekit.core.record import RunRecord
    from moekit.core.spec import MoESpec
    from moekit.core.trace import RoutingTrace
    from moekit.core.view import MoEView

ANALYSIS_FILE = "analysis.json"


def analyze(
    traces: Annotated[
        list[Path],
        typer.Argument(
            metavar="TRACE...",
            help="Traces that `moekit trace` wrote, or directories of traces such as the probes of "
            "a training run, or with --model routing that vLLM or SGLang returned (.npy, .json, "
            ".jsonl). Traces without training steps are read as one text.",
            show_default=False,
        ),
    ],
    measure: Annotated[
        list[str] | None,
        typer.Option(
            "--measure",
            "-m",
            metavar="NAMES",
            help="Measures, separated by commas; all that apply by default "
            "(`moekit list --kind measure`).",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="MEASURE.OPTION=VALUE",
            help="Set an option of a measure (`moekit show MEASURE`); the value is JSON or text.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The traced model, for measures that run it again; other models are refused.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help=f"Directory to write with {ANALYSIS_FILE}, all numbers."),
    ] = None,
    dtype: DtypeOption = Dtype.auto,
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Measure what the routers do, from traces.

    Load, specialisation by domain or language, dependence on the token, caches, prediction from
    layer to layer, and the course of training: each measure prints a table, --json and --out hold
    all numbers. Measures that do not apply to the traces are named with the reason.
    """
    with output(as_json) as printed:
        if out is not None:
            check_out(out)
        chosen = _settings(settings or [])
        names = _names(measure)
        from moekit.analyze import open_traces
        from moekit.analyze import run as analyses
        from moekit.core.record import start_record
        from moekit.core.trace_files import HEADER

        opened = open_traces(traces, _recorded_spec(model, traces))
        options = {"measure": names, "set": chosen, "model": model, "dtype": str(dtype)}
        headers = [
            file
            for path in traces
            for file in ([path] if path.is_file() else sorted(path.glob(f"**/{HEADER}")))
        ]
        record = start_record("analyze", options, seed=seed, inputs=headers)
        view = _view(model, opened, dtype, seed, threads)
        with progress("analyze", "measures") as update:
            analysis = analyses.analyze(
                opened, names, view=view, settings=chosen, seed=seed, progress=update
            )
        result = {
            "traces": [str(path) for path in traces],
            "tokens": [len(trace) for trace in opened],
            "model_type": opened[0].header.model_type,
            "seed": seed,
            **analysis.to_dict(),
        }
        _report(printed, opened, analysis)
        if out is not None:
            _write(out, result, record)
            printed.line(f"\nall numbers: {out / ANALYSIS_FILE}")
        printed.result(result)


def _names(measure: list[str] | None) -> list[str] | None:
    if measure is None:
        return None
    names = [name.strip() for text in measure for name in text.split(",") if name.strip()]
    if not names:
        raise UserError("--measure names no measure; `moekit list --kind measure` shows them")
    return names


def _settings(texts: list[str]) -> dict[str, dict[str, Any]]:
    settings: dict[str, dict[str, Any]] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        measure, dot, option = key.partition(".")
        if not (equals and dot and measure and option):
            raise UserError(f"--set {text!r} is not MEASURE.OPTION=VALUE, such as srp.segments=8")
        try:
            parsed = json.loads(value)
        except ValueError:
            parsed = value
        settings.setdefault(measure, {})[option] = parsed
    return settings


def _recorded_spec(model: str | None, paths: list[Path]) -> MoESpec | None:
    """The spec of the model, where a path is routing that another server recorded."""
    from moekit.core.trace_import import is_recorded

    if model is None or not any(map(is_recorded, paths)):
        return None
    from moekit.core.load import find_config
    from moekit.core.spec import spec_from_config

    return spec_from_config(find_config(model))


def _view(
    model: str | None,
    traces: list[RoutingTrace],
    dtype: Dtype,
    seed: int,
    threads: int | None,
) -> MoEView | None:
    if model is None:
        return None
    from moekit.cli.common import set_up
    from moekit.core.load import load_model, resolve_model
    from moekit.core.view import MoEView

    resolve_model(model)
    set_up(seed, threads)
    loaded, _ = load_model(model, None if dtype is Dtype.auto else dtype.value)
    return MoEView(loaded)


def _report(printed: Output, traces: list[RoutingTrace], analysis: Analysis) -> None:
    from moekit.core.registry import registry

    tokens = sum(map(len, traces))
    domains = list(dict.fromkeys(name for trace in traces for name in trace.domains))
    printed.line(
        f"{tokens} tokens in {len(traces)} traces, {len(traces[0].layers)} MoE layers of "
        f"{traces[0].header.model_type or 'an unknown model'}, {len(domains)} domains"
    )
    for name, result in analysis.results.items():
        method = registry.find(name, kind="measure")
        paper = f" ({method.paper})" if method.paper else ""
        printed.line(f"\n{name}: {method.title}{paper}")
        _print(printed, result)
    if analysis.left_out:
        printed.line("\nnot applicable")
        printed.table(list(analysis.left_out.items()))


def _print(printed: Output, result: Result) -> None:
    printed.table([[_cell(c) for c in row] for row in result.rows], header=result.columns)
    facts = [f"{key} {_cell(value)}" for key, value in result.summary.items()]
    printed.line("; ".join(facts))
    for text in result.notes:
        printed.line(f"note: {text}")


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if math.isnan(value):
            return "-"
        return f"{value:.3f}" if abs(value) < 1000 else f"{value:.0f}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_cell, value))
    return str(value)


def _write(out: Path, result: dict[str, Any], record: RunRecord) -> None:
    from moekit.core.record import FileHash

    partial = out.with_name(out.name + ".partial")
    file = partial / ANALYSIS_FILE
    try:
        partial.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result, ensure_ascii=False, allow_nan=False), encoding="utf-8")
        metrics = {"tokens": result["tokens"], "measures": list(result["measures"])}
        record.finish(metrics, [FileHash.of(file, file.name)]).save(partial)
        os.replace(partial, out)
    except OSError as error:
        raise UserError(f"cannot write --out {out}: {error.strerror}") from error
