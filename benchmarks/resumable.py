"""Results by key in a file beside the final one: a long benchmark goes on where it stopped."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class OutOfTime(Exception):
    """The part of the work that fits into --seconds is done."""


@dataclass
class Done:
    """Results by key, kept in `path`; `of` computes what is not there yet.

    A file with another `identity` (what makes results differ) is begun anew. Past `deadline`
    (time.monotonic) nothing new is begun: `OutOfTime`.
    """

    path: Path
    identity: dict[str, Any]
    deadline: float | None = None
    found: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path.exists():
            content = json.loads(self.path.read_text())
            if content["identity"] == self.identity:
                self.found = content["found"]

    def of(self, key: str, compute: Callable[[], Any]) -> Any:
        """The result called `key`."""
        if key not in self.found:
            if self.deadline is not None and time.monotonic() > self.deadline:
                raise OutOfTime
            self.found[key] = compute()
            self.path.write_text(json.dumps({"identity": self.identity, "found": self.found}))
            print(key, flush=True)
        return self.found[key]
