"""Records of files read in the background by native threads: the structures of `reads.h`."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_double, c_int32, c_int64, c_uint32, c_void_p
from typing import Any

from moekit.ops.native.library import Library

WHOLE = 0
CUT_SHORT = -1


class ReadRange(Structure):
    """Which bytes of a record belong to which checksum."""

    _fields_ = (("start", c_int64), ("stop", c_int64), ("sum", c_int32), ("pad", c_int32))


class ReadJob(Structure):
    """A record, where it goes, and its checksums."""

    _fields_ = (
        ("id", c_int64),
        *((name, c_int32) for name in ("file", "urgent")),
        *((name, c_int64) for name in ("offset", "size")),
        ("to", c_void_p),
        ("ranges", POINTER(ReadRange)),
        *((name, c_int32) for name in ("range_count", "pad")),
        ("sums", POINTER(c_uint32)),
    )


class ReadDone(Structure):
    """How a record ended."""

    _fields_ = (("id", c_int64), ("status", c_int32), ("pad", c_int32))


_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "reads_new": (c_void_p, (c_int32, c_int64)),
    "reads_free": (None, (c_void_p,)),
    "reads_submit": (None, (c_void_p, POINTER(ReadJob))),
    "reads_cancel": (c_int32, (c_void_p, c_int64)),
    "reads_hurry": (None, (c_void_p, c_int64)),
    "reads_wait": (c_int32, (c_void_p, c_double, POINTER(ReadDone))),
    "reads_close": (None, (c_void_p,)),
}


def ranges(parts: Sequence[tuple[int, int, int]]) -> ctypes.Array[ReadRange]:
    """Bytes start to stop of a record belong to checksum number n, for each (start, stop, n)."""
    return (ReadRange * len(parts))(*[ReadRange(*part, 0) for part in parts])


class Reads:
    """Threads that read records, `in_flight` pieces of about `piece` bytes at a time.

    Urgent records come before the others, each group in the order in which it was asked for. May be
    used from several threads; of those that wait one hears of a record.
    """

    def __init__(self, library: Library, in_flight: int, piece: int) -> None:
        self.c = library.c
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(self.c, name)
            function.restype, function.argtypes = result, arguments
        self._handle = self.c.reads_new(in_flight, piece)
        self._closer = weakref.finalize(self, _end, self.c, self._handle)

    def submit(
        self,
        number: int,
        file: int,
        offset: int,
        size: int,
        to: int,
        parts: ctypes.Array[ReadRange],
        sums: ctypes.Array[c_uint32],
        *,
        urgent: bool,
    ) -> None:
        """Read bytes [size] of an open file to address `to`, which needs to be aligned as the file
        is; `sums`, zeros before, get the checksums of `parts`. The caller keeps all of it alive.

        `number` names the record; no other that is not done may have it.
        """
        job = ReadJob(number, file, urgent, offset, size, to, parts, len(parts), 0, sums)
        self.c.reads_submit(self._handle, job)

    def cancel(self, number: int) -> bool:
        """Take a record back, unless some of it is being read already or was."""
        return bool(self.c.reads_cancel(self._handle, number))

    def hurry(self, number: int) -> None:
        """A record becomes urgent, behind those that are."""
        self.c.reads_hurry(self._handle, number)

    def wait(self, seconds: float) -> tuple[int, int] | None:
        """A record that is done, by its number, and how: `WHOLE`, `CUT_SHORT` or the number of the
        system's error. None where none was within `seconds`, or after `close`."""
        done = ReadDone()
        if self.c.reads_wait(self._handle, seconds, done):
            return done.id, done.status
        return None

    def close(self) -> None:
        """Wait for what is being read and drop the rest; whoever waits gets None."""
        self.c.reads_close(self._handle)


def _end(c: ctypes.CDLL, handle: int) -> None:
    c.reads_close(handle)
    c.reads_free(handle)
