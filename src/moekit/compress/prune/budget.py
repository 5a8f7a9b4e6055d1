"""What a search may spend, and the file that lets an interrupted one go on."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moekit.core.errors import UserError

FORMAT = "moekit.search"
VERSION = 1


@dataclass
class Budget:
    """Counts evaluations and seconds; None is no limit."""

    evaluations: int | None = None
    seconds: float | None = None
    spent: int = 0
    _start: float = field(default_factory=time.monotonic)

    @property
    def elapsed(self) -> float:
        """Seconds since the search began, in this process."""
        return time.monotonic() - self._start

    @property
    def exhausted(self) -> bool:
        """Whether nothing more may be evaluated."""
        over = self.evaluations is not None and self.spent >= self.evaluations
        return over or (self.seconds is not None and self.elapsed >= self.seconds)


class SearchFile:
    """The state of a search as JSON at `path`; None keeps nothing.

    `identity` is what makes two searches the same: model, data, method and options. Raises
    UserError where the file is of another search, or none.
    """

    def __init__(self, path: Path | None, identity: Mapping[str, Any]) -> None:
        self.path = path
        self.identity = json.loads(json.dumps(identity))

    def load(self) -> dict[str, Any] | None:
        """The state last saved, None where there is none."""
        if self.path is None or not self.path.exists():
            return None
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
            known = (data["format"], data["version"]) == (FORMAT, VERSION)
        except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
            raise UserError(f"{self.path} is no state of a search; remove it.") from error
        if not known:
            raise UserError(f"{self.path} is of another version of moekit; remove it.")
        for name, value in self.identity.items():
            if data["identity"].get(name) != value:
                raise UserError(
                    f"{self.path} is of a search with {name} {data['identity'].get(name)}, not "
                    f"{value}; remove it to start anew."
                )
        return dict(data["state"])

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace the file; a reader sees the old or the new state, never a part."""
        if self.path is None:
            return
        data = {"format": FORMAT, "version": VERSION, "identity": self.identity, "state": state}
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text(json.dumps(data), encoding="utf-8")
        os.replace(partial, self.path)
