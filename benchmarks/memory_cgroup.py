"""A memory cgroup of Linux, version 1 or 2: what processes in it are charged, and a limit."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import TracebackType

ROOT = Path("/sys/fs/cgroup")


class MemoryCgroup:
    """A context manager that makes the group `name` and removes it. Needs root.

    `wrap` before a command runs it inside; `limit` bounds it from then on.
    """

    def __init__(self, name: str) -> None:
        unified = (ROOT / "cgroup.controllers").exists()
        self.path = (ROOT if unified else ROOT / "memory") / name
        self._limit = "memory.max" if unified else "memory.limit_in_bytes"
        self._peak = "memory.peak" if unified else "memory.max_usage_in_bytes"

    def __enter__(self) -> MemoryCgroup:
        self.path.mkdir()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # A process that was killed is still counted for a moment after it was waited for.
        for _ in range(100):
            try:
                return self.path.rmdir()
            except OSError:
                time.sleep(0.1)
        self.path.rmdir()

    @property
    def wrap(self) -> tuple[str, ...]:
        procs = self.path / "cgroup.procs"
        return ("sh", "-c", f'echo $$ > {procs} && exec "$@"', "sh")

    def limit(self, nbytes: int) -> None:
        (self.path / self._limit).write_text(str(nbytes))

    @property
    def peak(self) -> int:
        """The most bytes charged so far, page cache included."""
        return int((self.path / self._peak).read_text())


def forget_pages(path: Path) -> None:
    """Drop a file from the page cache, where it would be free for whoever reads it next."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)
