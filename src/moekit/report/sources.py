"""What a report is about: the things named on the command line, grouped into one or two subjects.

A model, a trace, stats, an analysis and a training run of one model are parts of one subject. The
second of a kind begins the second subject.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moekit.analyze import Result, open_traces
from moekit.analyze.traces import in_order_of_training
from moekit.core.errors import UserError
from moekit.core.record import RECORD_FILE, RunRecord
from moekit.core.stats import ExpertStats
from moekit.core.trace import RoutingTrace

LOG, EVALUATION = "log.jsonl", "evaluation.json"


@dataclass
class TrainingRun:
    """The log of a training run, an entry a line; `bits_per_byte` by domain at its end."""

    entries: list[dict[str, Any]]
    bits_per_byte: dict[str, float] = field(default_factory=dict)


@dataclass
class Subject:
    """One model as far as it is known: `source` to load it from, and what was measured before.

    `traces` are of one text, `probes` of one text at several steps of training, in order.
    """

    name: str
    source: str | None = None
    traces: list[RoutingTrace] = field(default_factory=list)
    probes: list[RoutingTrace] = field(default_factory=list)
    stats: ExpertStats | None = None
    results: dict[str, Result] = field(default_factory=dict)
    training: TrainingRun | None = None
    record: RunRecord | None = None


def read_subjects(names: Sequence[str]) -> list[Subject]:
    """Open everything named, in order; one subject, or two for a comparison.

    Raises UserError for what is none of the known things, is damaged, or makes a third subject.
    """
    subjects: list[Subject] = []
    seen: set[str] = set()
    for name in names:
        kind = _kind(name)
        if not subjects or kind in seen:
            subjects.append(Subject(Path(name).name or name))
            seen = set()
        seen.add(kind)
        if len(subjects) > 2:
            raise UserError(
                f"{name} begins a third model: a report is about one, or compares two "
                "(one model's trace, stats and analysis follow one another)"
            )
        _READERS[kind](subjects[-1], name)
    if len(subjects) == 2 and subjects[0].name == subjects[1].name:
        first, second = subjects
        first.name, second.name = f"{first.name} (1)", f"{second.name} (2)"
    return subjects


def _kind(name: str) -> str:
    from moekit.core.load import BABEL, resolve_model

    path = Path(name).expanduser()
    if name == BABEL or not path.is_dir():
        resolve_model(name)
        return "model"
    for file, kind in (
        ("trace.json", "trace"),
        ("stats.json", "stats"),
        ("analysis.json", "analysis"),
        ("config.json", "model"),
        (LOG, "training"),
    ):
        if (path / file).is_file():
            return kind
    if next(path.glob("*/trace.json"), None) or next(path.glob("probes/*/trace.json"), None):
        return "trace"
    raise UserError(
        f"{name} holds no model, trace, stats, analysis or training log "
        "(config.json, trace.json, stats.json, analysis.json or log.jsonl)"
    )


def _read_model(subject: Subject, name: str) -> None:
    from moekit.core.load import resolve_model

    subject.source = name
    found = resolve_model(name)
    if isinstance(found, str):
        return
    if (found / "training" / LOG).is_file():
        _read_training(subject, str(found / "training"))
    if (found / RECORD_FILE).is_file():
        subject.record = RunRecord.load(found)


def _read_trace(subject: Subject, name: str) -> None:
    found = open_traces([name])
    course = in_order_of_training(found)
    if course is None:
        subject.traces = found
    else:
        subject.probes = course
    if subject.record is None and (Path(name) / RECORD_FILE).is_file():
        subject.record = RunRecord.load(name)


def _read_stats(subject: Subject, name: str) -> None:
    subject.stats = ExpertStats.open(name)
    if subject.record is None and (Path(name) / RECORD_FILE).is_file():
        subject.record = RunRecord.load(name)


def _read_analysis(subject: Subject, name: str) -> None:
    path = Path(name) / "analysis.json"
    try:
        measures = json.loads(path.read_text(encoding="utf-8"))["measures"]
        for measure, content in measures.items():
            rows = content["table"]
            columns = tuple(rows[0]) if rows else ()
            subject.results[str(measure)] = Result(
                columns,
                [tuple(row[column] for column in columns) for row in rows],
                dict(content["summary"]),
                dict(content["detail"]),
                [str(note) for note in content["notes"]],
            )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read as an analysis: {error!r}") from error


def _read_training(subject: Subject, name: str) -> None:
    folder = Path(name)
    path = folder / LOG
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        entries = [json.loads(line) for line in lines if line.strip()]
        if not all(isinstance(e, dict) and isinstance(e.get("step"), int) for e in entries):
            raise ValueError("an entry has no step")
        bits: dict[str, float] = {}
        if (folder / EVALUATION).is_file():
            evaluation = json.loads((folder / EVALUATION).read_text(encoding="utf-8"))
            bits = {str(k): float(v) for k, v in evaluation["by_domain"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder} cannot be read as a training log: {error}") from error
    if not entries:
        raise UserError(f"{path} is empty: the run has not logged a step yet")
    subject.training = TrainingRun(entries, bits)
    if not subject.probes and next(folder.glob("probes/*/trace.json"), None):
        subject.probes = in_order_of_training(open_traces([folder / "probes"])) or []


_READERS = {
    "model": _read_model,
    "trace": _read_trace,
    "stats": _read_stats,
    "analysis": _read_analysis,
    "training": _read_training,
}
