"""`moekit run` with an engine: the memory table before, what was read and how fast after."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from moekit.cli.common import Dtype, note, progress, set_up, table_lines
from moekit.core.errors import UserError
from moekit.core.memory import format_bytes

if TYPE_CHECKING:
    from transformers import BatchEncoding

    from moekit.runtime.engine import Engine
    from moekit.runtime.generate import Generation


class EngineSpeaker:
    """An engine that generates text."""

    def __init__(self, engine: Engine, seed: int) -> None:
        self.engine, self.tokenizer = engine, engine.tokenizer
        self._seed = seed

    def generate(self, encoded: BatchEncoding, **options: Any) -> Generation:
        """Continue one encoded prompt; what the experts cost is noted."""
        from moekit.runtime.generate import generate_with_engine

        done = generate_with_engine(self.engine, encoded, seed=self._seed, **options)
        stats = self.engine.stats
        if self.engine.cache is not None:
            note(
                f"[experts: {stats.hit_rate:.1%} of {stats.hits + stats.misses} in memory, "
                f"{format_bytes(stats.bytes_read)} read; peak {format_bytes(stats.peak_bytes)}]"
            )
        return done

    def account(self) -> dict[str, Any]:
        """Memory and experts, for --json."""
        stats = self.engine.stats
        values: dict[str, Any] = {
            **asdict(stats),
            "hit_rate": stats.hit_rate,
            "ms_per_token": stats.ms_per_token,
        }
        if self.engine.budget is not None:
            values["memory"] = self.engine.budget.to_dict()
        return {"engine": values}


@contextmanager
def opened(
    model: str, options: dict[str, Any], dtype: Dtype, seed: int, threads: int | None
) -> Iterator[EngineSpeaker]:
    """The engine for `options`, with its memory table on standard error; closed at the end."""
    from moekit.core.load import resolve_model

    resolve_model(model)
    set_up(seed, threads)
    import moekit

    with progress("packing", "B") as update:
        engine = moekit.open_engine(
            model,
            threads=threads,
            dtype=None if dtype is Dtype.auto else dtype.value,
            progress=update,
            note=note,
            **options,
        )
    with engine:
        if engine.tokenizer is None:
            raise UserError(f"{model} has no tokenizer, so it cannot read text")
        for line in engine.notes:
            note(line)
        if engine.budget is not None:
            rows = [(name, format_bytes(n), text) for name, n, text in engine.budget.rows()]
            note("\n".join(table_lines(rows)))
        yield EngineSpeaker(engine, seed)
