"""A shard on disk while it is being written, and writes that survive a crash."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import torch

from moekit.core.shards import Shard


class ShardFile:
    """One shard open for writing, with its blocks reserved and its header in place.

    Opening one that was begun before keeps what is in it. Raises OSError, also for a full disk.
    """

    def __init__(self, path: Path, shard: Shard) -> None:
        self.shard = shard
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            os.ftruncate(self._file, shard.size)
            self._reserve(shard.size)
            # Also when resuming: the interruption may have come between the last two steps.
            os.pwrite(self._file, shard.header, 0)
        except BaseException:
            os.close(self._file)
            raise

    def _reserve(self, size: int) -> None:
        # This finds out about a full disk now and not hours later.
        try:
            os.posix_fallocate(self._file, 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise

    def write(self, rows: torch.Tensor, offset: int) -> None:
        """Write a tensor's bytes at `offset` of the file."""
        view = rows.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
        done = 0
        while done < len(view):
            done += os.pwrite(self._file, view[done:], offset + done)

    def sync(self) -> None:
        """Return when everything written is on the disk."""
        os.fdatasync(self._file)

    def close(self) -> None:
        """Sync and close."""
        try:
            self.sync()
        finally:
            os.close(self._file)


def fsync(path: Path) -> None:
    """Return when a file, or the names in a directory, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_durably(path: Path, data: bytes) -> None:
    """Write a small file and return when it is on the disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
