"""Result directories, set side by side: what was done, how many bytes are left, at what loss."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moekit.core.errors import UserError
from moekit.core.record import RECORD_FILE, RunRecord
from moekit.evaluate.quality import Quality, qualities

# Options that say where something lies or how fast, not what was done.
NOT_SETTINGS = {
    "batch_size",
    "command",
    "copy_code",
    "eval",
    "max_shard_bytes",
    "out",
    "overwrite",
    "restart",
    "seed",
    "stats",
    "threads",
}


@dataclass(frozen=True)
class RunResult:
    """One finished run: its settings, bytes of tensors, and quality before and after.

    Quality is None where it was not measured. `calibration` names the statistics or the text that
    decided, where the method needed any.
    """

    directory: Path
    command: str
    settings: dict[str, Any]
    seed: int | None
    size: int
    quality: Quality | None
    before: Quality | None
    calibration: str | None
    seconds: float


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over the seeds; None for a single one."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        deviation = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), deviation)

    def text(self, digits: int = 4) -> str:
        shown = f"{self.mean:.{digits}f}"
        return shown if self.deviation is None else f"{shown} ± {self.deviation:.{digits}f}"


@dataclass(frozen=True)
class Row:
    """Runs that differ in their seed only.

    `loss` is the mean over domains of bits per byte, `increase` that over the model before (None
    where it was not measured), `on_front` whether no other row is smaller and better.
    """

    label: str
    settings: dict[str, Any]
    seeds: list[int | None]
    size: int
    loss: Spread
    increase: Spread | None
    domains: dict[str, Spread]
    seconds: float
    on_front: bool = False

    def to_dict(self) -> dict[str, Any]:
        def plain(spread: Spread | None) -> dict[str, float | None] | None:
            return None if spread is None else vars(spread).copy()

        domains = {name: plain(spread) for name, spread in self.domains.items()}
        spreads = {"loss": plain(self.loss), "increase": plain(self.increase), "domains": domains}
        return {**vars(self), **spreads}


@dataclass(frozen=True)
class Comparison:
    """Rows by size, the quality of the model they were made from, and what to know of them."""

    rows: list[Row]
    before: Quality | None
    size_before: int | None
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {
            "rows": [row.to_dict() for row in self.rows],
            "before": None if self.before is None else self.before.to_dict(),
            "size_before": self.size_before,
            "notes": self.notes,
        }


# With a method these follow from it, its settings and the seed.
FROM_METHOD = {"plan", "recipe", "rewrite"}


def read_result(directory: Path) -> RunResult:
    """The run that left its record in `directory`; `UserError` where there is none."""
    record = RunRecord.load(directory)
    where = str(directory / RECORD_FILE)
    before, after = qualities(record.metrics, where)
    size = record.metrics.get("bytes")
    if not isinstance(size, int):
        raise UserError(f"{where} does not say how many bytes the result takes.")
    calibration = record.options.get("stats") or record.options.get("data")
    left_out = NOT_SETTINGS | (FROM_METHOD if "method" in record.options else set())
    settings = {key: value for key, value in record.options.items() if key not in left_out}
    return RunResult(
        directory,
        record.command,
        {key: value for key, value in settings.items() if value not in (None, [], {}, False)},
        record.seed,
        size,
        after,
        before,
        str(calibration) if calibration else None,
        record.seconds,
    )


def compare_results(results: Sequence[RunResult], size_before: int | None = None) -> Comparison:
    """Group runs that differ in their seed only, and mark the Pareto front of size and loss.

    `size_before` is the bytes of the model they were made from. Raises `UserError` for no results,
    for qualities that are missing or were measured on different text or windows, and for one seed
    given twice.
    """
    if not results:
        raise UserError("there are no results to compare.")
    first = results[0]
    for result in results:
        if not _quality(result).measured_alike(_quality(first)):
            raise UserError(
                f"{result.directory} and {first.directory} were measured on different text or "
                "windows, so they do not compare; give --data to measure both alike."
            )
    groups: dict[tuple[str, str], list[RunResult]] = {}
    for result in results:
        groups.setdefault((result.command, repr(sorted(result.settings.items()))), []).append(
            result
        )
    varying = _varying(results)
    rows = [_row(group, varying) for group in groups.values()]
    front = pareto_front([(row.size, row.loss.mean) for row in rows])
    rows = [Row(**{**vars(row), "on_front": place in front}) for place, row in enumerate(rows)]
    rows.sort(key=lambda row: (row.size, row.loss.mean))
    notes = _calibration_notes(list(groups.values()))
    before = next((result.before for result in results if result.before is not None), None)
    return Comparison(rows, before, size_before, notes)


def pareto_front(points: Sequence[tuple[float, float]]) -> set[int]:
    """Places of the points (both coordinates: less is better) that no other point dominates."""
    front: set[int] = set()
    best = math.inf
    for place in sorted(range(len(points)), key=lambda place: points[place]):
        if points[place][1] < best:
            front.add(place)
            best = points[place][1]
    return front


def _quality(result: RunResult) -> Quality:
    if result.quality is None:
        raise UserError(
            f"{result.directory / RECORD_FILE} holds no quality of the result: give --data to "
            "measure it, or make the result again with --eval."
        )
    return result.quality


def _row(group: Sequence[RunResult], varying: Sequence[str]) -> Row:
    seeds = [result.seed for result in group]
    if len(set(seeds)) < len(seeds):
        twice = next(seed for seed in seeds if seeds.count(seed) > 1)
        places = [str(result.directory) for result in group if result.seed == twice]
        raise UserError(f"{' and '.join(places)} are one run with seed {twice}; give one of them.")
    after = [_quality(result) for result in group]
    increases = [
        quality.mean - result.before.mean
        for quality, result in zip(after, group, strict=True)
        if result.before is not None
    ]
    return Row(
        label=_label(group[0], varying),
        settings={"command": group[0].command, **group[0].settings},
        seeds=sorted(seeds, key=lambda seed: -1 if seed is None else seed),
        # Seeds choose other experts of the same number; where formats differ the largest counts.
        size=max(result.size for result in group),
        loss=Spread.of([quality.mean for quality in after]),
        increase=Spread.of(increases) if len(increases) == len(group) else None,
        domains={
            name: Spread.of([quality.bits_per_byte[name] for quality in after])
            for name in after[0].bits_per_byte
        },
        seconds=sum(result.seconds for result in group),
    )


def _varying(results: Sequence[RunResult]) -> list[str]:
    """Settings, the method aside, whose value is not the same in all results."""
    names = {name for result in results for name in result.settings if name != "method"}
    return sorted(n for n in names if len({repr(r.settings.get(n)) for r in results}) > 1)


def _label(result: RunResult, varying: Sequence[str]) -> str:
    method = result.settings.get("method")
    parts = [result.command.removeprefix("compress ") if method is None else str(method)]
    parts += [
        f"{name.replace('_', '-')} {_shown(result.settings[name])}"
        for name in varying
        if name in result.settings and name != "model"
    ]
    return ", ".join(parts)


def _shown(value: Any) -> Any:
    """A setting by layer that is the same in all of them is shown once."""
    if isinstance(value, Mapping) and len({repr(one) for one in value.values()}) == 1:
        return next(iter(value.values()))
    return value


def _calibration_notes(groups: Sequence[Sequence[RunResult]]) -> list[str]:
    used = {
        (result.seed, result.calibration)
        for group in groups
        for result in group
        if result.calibration is not None
    }
    seeds = [seed for seed, _ in used]
    mixed = sorted({str(seed) for seed in seeds if seeds.count(seed) > 1})
    if not mixed:
        return []
    return [
        f"Calibration is not matched: runs with seed {', '.join(mixed)} decided from different "
        "text."
    ]
