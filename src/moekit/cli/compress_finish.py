"""What every verb of `moekit compress` does with its plan: write it, or the model it makes."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moekit.cli.before_and_after import Evaluation, measured, rows
from moekit.cli.common import Output, check_out, note
from moekit.cli.formats import Format, FormatOptions, print_written, write_format
from moekit.core.errors import UserError

if TYPE_CHECKING:
    from moekit.core.plan import ExpertPlan
    from moekit.core.rewrite import Rewrite


@dataclass
class Destination:
    """Where a compression goes: the model at `out` in a format, or a plan alone at `plan_only`."""

    verb: str
    model: str
    out: Path | None
    plan_only: Path | None
    formats: FormatOptions
    seed: int = 0
    threads: int | None = None
    evaluate: tuple[str, ...] = ()
    source: Path = field(init=False)

    @property
    def evaluation(self) -> Evaluation:
        return Evaluation(self.evaluate, self.seed, self.threads)

    def check(self) -> None:
        """Refuse what cannot be written, before any work; resolves the model to `source`."""
        if (self.out is None) == (self.plan_only is None):
            raise UserError("give either OUT, the model to write, or --plan-only FILE")
        if self.plan_only is not None:
            check_out(self.plan_only)
            if self.evaluate:
                raise UserError("--eval needs the model: give OUT instead of --plan-only")
        elif self.out is not None and not self.formats.overwrite and self.out.exists():
            raise UserError(f"{self.out} exists; give another directory or --overwrite")
        if self.evaluate and self.formats.to is Format.gguf:
            raise UserError("--eval does not read GGUF files; measure them with llama.cpp")
        reader = importlib.util.find_spec("compressed_tensors")
        if self.evaluate and self.formats.to is Format.compressed_tensors and reader is None:
            raise UserError("--eval of this format needs pip install compressed-tensors")
        self.evaluation.check()
        from moekit.core.load import find_model

        self.source = find_model(self.model)


def finish(
    printed: Output,
    to: Destination,
    plan: ExpertPlan,
    rewrite: Rewrite | None = None,
    *,
    data: Mapping[str, Any],
    numbers: Mapping[str, Any] | None = None,
) -> None:
    """Write the plan or the model, evaluate, and complete record and card.

    `data` are the settings of the calibration and of the method, for record and card; `numbers`
    what the method found. With `plan_only` nothing but the plan is written.
    """
    numbers = dict(numbers or {})
    if to.plan_only is not None:
        plan.save(to.plan_only)
        printed.line(plan.table())
        printed.line(f"wrote {to.plan_only}; apply it with moekit convert MODEL OUT --plan")
        printed.result({"plan": str(to.plan_only), "numbers": numbers, "data": dict(data)})
        return
    assert to.out is not None
    samples = [] if to.formats.dry_run else to.evaluation.samples()
    before = None if not samples else to.evaluation.quality(to.model, samples)
    result = write_format(to.source, to.out, to.formats, plan, rewrite)
    if to.formats.dry_run:
        printed.line(plan.table())
    print_written(printed, result, to.formats.dry_run)
    found: dict[str, Any] = {}
    if not to.formats.dry_run:
        if before is not None:
            after = to.evaluation.quality(str(to.out), samples)
            found = measured(before, after)
            numbers |= rows(before, after)
            for name, value in rows(before, after).items():
                printed.line(f"{name}: {value}")
        _complete(to, plan, result, dict(data), numbers, found)
    printed.result(
        {
            **asdict(result),
            "dry_run": to.formats.dry_run,
            "numbers": numbers,
            "data": dict(data),
            **found,
        }
    )


def _complete(
    to: Destination,
    plan: ExpertPlan,
    result: Any,
    data: dict[str, Any],
    numbers: dict[str, Any],
    found: dict[str, Any],
) -> None:
    """Write what is only known now into the record and the card beside the output."""
    from moekit.core.model_card import CARD_FILE, PLAN_DIRECTORY, ModelCard, read_card
    from moekit.core.plan import PLAN_FILE
    from moekit.core.record import RECORD_FILE, RunRecord
    from moekit.export.gguf import CARD_SUFFIX, PLAN_SUFFIX, RECORD_SUFFIX

    assert to.out is not None
    gguf = to.formats.to is Format.gguf
    paths = (
        (to.out.with_name(to.out.name + RECORD_SUFFIX), to.out.with_name(to.out.name + CARD_SUFFIX))
        if gguf
        else (to.out / RECORD_FILE, to.out / CARD_FILE)
    )
    record = RunRecord.load(paths[0])
    record.command = f"compress {to.verb}"
    record.seed = to.seed
    record.options = {**record.options, "to": to.formats.to.value, **_plain(data)}
    record.metrics |= {**_plain(numbers), **found}
    paths[0].write_text(record.to_json(), encoding="utf-8")
    card = ModelCard(
        to.model,
        shlex.join(["moekit", *sys.argv[1:]]),
        plan,
        (result.source_bytes, result.bytes),
        result.notes,
        data,
        numbers,
        to.out.name + PLAN_SUFFIX if gguf else f"{PLAN_DIRECTORY}/{PLAN_FILE}",
    )
    paths[1].write_text(card.text(read_card(to.source)), encoding="utf-8")
    note(f"record and model card: {paths[0]}, {paths[1]}")


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value if isinstance(value, int | float | bool | list | dict | None) else str(value)
        for name, value in values.items()
    }
