"""What a run says of itself: a JSON line an entry, and the same numbers to trackers."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .distributed import World
from .metrics import router_metrics
from .step import StepResult, add_counts
from .track import Tracker, flat_numbers


class RunLog:
    """A JSON line an entry. On resuming, entries after the checkpoint's step are dropped."""

    def __init__(self, path: Path, step: int, active: bool, trackers: list[Tracker]) -> None:
        self.path, self.active, self._trackers = path, active, trackers
        if active and path.exists():
            lines = [line for line in path.read_text().splitlines() if line]
            kept = [line for line in lines if json.loads(line)["step"] <= step]
            path.write_text("".join(line + "\n" for line in kept))

    def last_step(self) -> dict[str, Any]:
        """The newest entry of a training step; empty before the first."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return next((e for e in map(json.loads, reversed(lines)) if "loss" in e), {})

    def write(self, entry: dict[str, Any]) -> None:
        if self.active:
            with self.path.open("a") as file:
                file.write(json.dumps(entry) + "\n")
            for tracker in self._trackers:
                tracker.log(flat_numbers(entry), entry["step"])

    def close(self) -> None:
        """End the trackers' runs."""
        for tracker in self._trackers:
            tracker.close()


class Window:
    """The steps since the last entry, summed over them and over all processes."""

    def __init__(self, step: int) -> None:
        self.restart_clock(step)
        self._counts: list[Tensor] = []
        self._lost: list[Tensor] = []
        self._sums = torch.zeros(3)

    def restart_clock(self, step: int) -> None:
        """Leave what has taken place since the last step out of the speed."""
        self._clock, self._since = time.perf_counter(), step

    def add(self, result: StepResult, counts: list[Tensor], lost: list[Tensor]) -> None:
        """One step: this process's `result`, and all processes' pairs by expert and lost pairs."""
        self._sums += torch.tensor([result.loss, result.balance, 1.0])
        self._counts = add_counts(self._counts, counts)
        self._lost = add_counts(self._lost, lost)

    def entry(self, world: World, step: int, tokens_a_step: int) -> dict[str, Any]:
        """The entry of the window that ends with `step`; every process must ask for it."""
        loss, balance, steps = world.sum_(self._sums.to(world.device)).tolist()
        tokens = (step - self._since) * tokens_a_step
        entry: dict[str, Any] = {
            "step": step,
            "tokens": step * tokens_a_step,
            "loss": round(loss / steps, 5),
            "balance": round(balance / steps, 5),
            "tokens_per_second": round(tokens / (time.perf_counter() - self._clock), 1),
        }
        if self._counts:
            seen = round(steps / world.size) * tokens_a_step
            entry["routers"] = router_metrics(self._counts, self._lost, seen)
        return entry


def line_of(entry: dict[str, Any], steps: int) -> str:
    """The entry for people."""
    line = f"step {entry['step']}/{steps} loss {entry['loss']:.4f}"
    line += f" {entry['tokens_per_second']:,.0f} tokens/s"
    if "routers" in entry:
        routers = entry["routers"]
        line += f" imbalance {max(routers['imbalance']):.2f} dead {routers['dead']}"
    return line
