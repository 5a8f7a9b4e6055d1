"""Bits per byte of a model before and after a verb changed it, for `--eval` and the record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moekit.cli.common import Dtype, open_language_model, progress
from moekit.core.errors import UserError

if TYPE_CHECKING:
    from moekit.evaluate.quality import Quality
    from moekit.evaluate.text import Sample


@dataclass(frozen=True)
class Evaluation:
    """Texts of `--eval`, and how models are opened to be measured on them."""

    texts: tuple[str, ...]
    seed: int = 0
    threads: int | None = None

    def check(self) -> None:
        """Raise `UserError` for a text that is not there."""
        for text in self.texts:
            if not Path(text).exists():
                raise UserError(f"--eval {text}: no such file or directory")

    def samples(self) -> list[Sample]:
        from moekit.evaluate.text import read_texts

        return read_texts(self.texts) if self.texts else []

    def quality(self, model: str, samples: Sequence[Sample]) -> Quality:
        """Bits per byte of `samples` by domain under a model, dense or MoE."""
        from moekit.evaluate.quality import measure_quality

        loaded = open_language_model(model, Dtype.auto, self.seed, self.threads)
        with progress("eval", "windows") as advance:
            return measure_quality(loaded.model, loaded.tokenizer, samples, progress=advance)


def rows(before: Quality, after: Quality) -> dict[str, str]:
    """Lines of both by domain, and of their mean where there are several."""
    found = {
        f"bits per byte, {name}": f"{value:.4f} before, {after.bits_per_byte[name]:.4f} after"
        for name, value in before.bits_per_byte.items()
    }
    if len(found) > 1:
        found["bits per byte, mean"] = f"{before.mean:.4f} before, {after.mean:.4f} after"
    return found


def measured(before: Quality, after: Quality) -> dict[str, Any]:
    """Both as a record holds them."""
    from moekit.evaluate.quality import QUALITY, QUALITY_BEFORE

    return {QUALITY_BEFORE: before.to_dict(), QUALITY: after.to_dict()}


def complete(
    out: Path,
    found: dict[str, Any],
    lines: dict[str, str],
    options: Mapping[str, Any] | None = None,
) -> None:
    """Add what was measured after writing to the record and the card in directory `out`, and
    `options` to those that the record has."""
    from moekit.core.model_card import CARD_FILE
    from moekit.core.record import RunRecord

    record = RunRecord.load(out)
    record.metrics |= found
    record.options |= options or {}
    record.save(out)
    card = out / CARD_FILE
    told = "".join(f"- {name}: {value}\n" for name, value in lines.items())
    card.write_text(card.read_text(encoding="utf-8") + f"\n## Numbers\n\n{told}", encoding="utf-8")
