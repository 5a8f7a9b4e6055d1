"""moekit's engine behind `worker_loop`.

python -m moekit.bench.worker_moekit DIR --threads 2 [--memory 6GiB] [--runner native] [...]
"""

from __future__ import annotations

import argparse
import dataclasses
import zlib
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch

import moekit
from moekit.bench.worker_loop import serve
from moekit.runtime.choose_policy import watch_routing


class Moekit:
    """One sequence of an engine's runner. `record` keeps what the routers of a step chose; of the
    logits of all steps a checksum is kept."""

    def __init__(self, path: str, context: int | None, record: bool, **options: Any) -> None:
        self._engine = moekit.open_engine(path, max_context=context, streams=1, **options)
        self._runner = self._engine.runner
        self._context = self._engine.max_context
        self._sequence: Any = None
        self._routing: list[np.ndarray] = []
        self._checksum = 0
        if record:
            # For as long as the program runs.
            self._watching = ExitStack()
            self._watching.enter_context(watch_routing(self._engine, self._keep))

    def _keep(self, layer: int, ids: np.ndarray) -> None:
        self._routing.append(ids.copy())

    def _begin(self) -> None:
        if self._sequence is not None:
            self._runner.drop(self._sequence)
        self._sequence = self._runner.new_sequence(self._context)

    def prefill(self, ids: list[int]) -> None:
        self._begin()
        self._runner.forward([self._sequence], [ids])

    def step(self, token: int) -> None:
        self._logits = torch.as_tensor(self._runner.forward([self._sequence], [[token]]))

    def stepped(self) -> None:
        self._checksum = zlib.crc32(self._logits.numpy().data, self._checksum)

    def logits(self, ids: list[int]) -> np.ndarray:
        self._begin()
        rows = self._runner.forward([self._sequence], [ids], all_positions=True)[0]
        return torch.as_tensor(rows).float().numpy()

    def fill(self) -> bool:
        """Read the experts that have not been asked for yet; whether all are in memory then."""
        cache = self._engine.cache
        if cache is not None:
            cache.load_all()
        return cache is None or cache.complete

    def stats(self) -> dict[str, Any]:
        """Of the engine, its cache and its budget, the checksum of the logits of all steps; and
        routing [steps, K] so far if recorded."""
        engine = self._engine
        found: dict[str, Any] = {
            "engine": dataclasses.asdict(engine.stats),
            "notes": engine.notes,
            "checksum": self._checksum,
        }
        if engine.cache is not None:
            found["cache"] = dataclasses.asdict(engine.cache.stats)
        if engine.budget is not None:
            found["budget"] = engine.budget.to_dict()
        if self._routing:
            found["routing"] = np.concatenate(self._routing).tolist()
        return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory")
    parser.add_argument("--context", type=int)
    for option in ("memory", "expert-cache", "runner", "dtype", "resident-codec"):
        parser.add_argument(f"--{option}")
    for option in ("policy", "predictor"):
        parser.add_argument(f"--{option}")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-prefetch", action="store_true")
    parser.add_argument("--record-routing", action="store_true")
    given = vars(parser.parse_args())
    directory, context = given.pop("directory"), given.pop("context")
    record = given.pop("record_routing")
    options = {name: value for name, value in given.items() if value not in (None, False)}
    if options.pop("no_prefetch", False):
        options["prefetch"] = False
    serve(lambda: Moekit(directory, context, record, **options))
