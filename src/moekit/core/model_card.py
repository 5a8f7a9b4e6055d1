"""The README.md beside a changed model: what was done to it, by which data, with what result."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moekit.core.memory import format_bytes
from moekit.core.plan import PLAN_FILE, ExpertPlan

CARD_FILE = "README.md"
PLAN_DIRECTORY = "plan"
_FRONT = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
BEGIN = "<!-- moekit: what was done to this model -->"
END = "<!-- moekit: end -->"


@dataclass
class ModelCard:
    """What a card says: the source model, the command, the plan, bytes (before, after), notes.

    `data` are the settings of the calibration and `numbers` measured results, both by name;
    `plan_at` is where the plan lies beside the card.
    """

    source: str
    command: str
    plan: ExpertPlan
    bytes: tuple[int, int]
    notes: Sequence[str] = ()
    data: Mapping[str, Any] = field(default_factory=dict)
    numbers: Mapping[str, Any] = field(default_factory=dict)
    plan_at: str = f"{PLAN_DIRECTORY}/{PLAN_FILE}"

    def text(self, original: str = "") -> str:
        """The card as Markdown, above the `original` model's own card."""
        before, after = map(format_bytes, self.bytes)
        lines = [
            BEGIN,
            f"# {Path(self.source).name}, compressed",
            "",
            f"Made by moekit from `{self.source}`: {before} of weights before, {after} after.",
            "",
            "```",
            self.command,
            "```",
            "",
            "## Plan",
            "",
            f"Also as JSON in `{self.plan_at}`.",
            "",
            "```",
            self.plan.table(),
            "```",
            "",
        ]
        if self.plan.fit is not None:
            lines += [f"Values computed by {self.plan.fit.method}:", ""]
            lines += _bullets(self.plan.fit.options)
        if self.notes:
            lines += [*(f"- {note}" for note in self.notes), ""]
        if self.data:
            lines += ["## Data", "", *_bullets(self.data)]
        if self.numbers:
            lines += ["## Numbers", "", *_bullets(self.numbers)]
        front = _FRONT.match(original)
        body = _without_card(original[front.end() :] if front else original)
        if body.strip():
            lines += ["The card of the original model follows.", ""]
        head = front[0] if front else ""
        return head + "\n".join([*lines, END, ""]) + ("\n" + body if body.strip() else "")


def read_card(directory: Path) -> str:
    """The text of the card in a model's directory, empty where there is none that can be read."""
    path = directory / CARD_FILE
    if not path.is_file():
        return ""
    return path.read_text(encoding="utf-8", errors="replace")


def _bullets(values: Mapping[str, Any]) -> list[str]:
    given = {name: value for name, value in values.items() if value is not None}
    return [*(f"- {name}: {_plain(value)}" for name, value in given.items()), ""]


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _without_card(text: str) -> str:
    """A model that is compressed twice has one card of ours: the last."""
    start, end = text.find(BEGIN), text.find(END)
    if start < 0 or end < start:
        return text
    return text[:start] + text[end + len(END) :].lstrip("\n")
