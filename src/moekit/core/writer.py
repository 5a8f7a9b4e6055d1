"""Writing a checkpoint piece by piece, so that an interruption costs little and fools nobody.

Everything goes to `OUT.partial/`, whose `journal.json` says what was asked for and how far it is.
The shards are laid out before the first byte is written, so a fused bank of any size is written
expert by expert into its place. `OUT` appears by one rename, when everything is on disk.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from moekit.core.checkpoint import INDEX_FILE, TensorInfo, read_json
from moekit.core.errors import UserError
from moekit.core.memory import format_bytes
from moekit.core.shard_file import ShardFile, fsync, write_durably
from moekit.core.shards import Shard, plan_shards

JOURNAL = "journal.json"
JOURNAL_VERSION = 1
DEFAULT_SHARD_BYTES = 5 * 10**9
# Progress is made durable after this many bytes: at most so much work is repeated after a crash.
JOURNAL_BYTES = 256 * 2**20

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class WriteInterrupted(KeyboardInterrupt):
    """Ctrl-C while writing; the message says what is left and how to resume or discard it."""


def check_output(out: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Raise `UserError` for an output that exists and may not be replaced; touches nothing."""
    path = Path(os.path.realpath(out))
    if not os.path.lexists(path):
        return
    if not path.is_dir():
        raise UserError(f"{out} is a file; give the output directory another name.")
    if not any(path.iterdir()):
        return
    if not overwrite:
        raise UserError(f"{out} exists; give another name or --overwrite to replace it.")
    if not (path / "config.json").is_file() and not any(path.glob("*.safetensors")):
        raise UserError(
            f"{out} holds no checkpoint, so --overwrite does not replace it; give another name."
        )


class CheckpointWriter:
    """Context manager that writes `tensors` (name -> `TensorInfo`, in writing order) to `out`.

    Use it as::

        with CheckpointWriter(out, tensors, identity={"source": ...}) as writer:
            for name, row in writer.pending():        # after an interruption: what is left
                writer.write_rows(name, row, tensor)  # any number of pieces, in order
            writer.write_file("config.json", data)
            writer.commit()

    `identity` (plain JSON values) says what is being written. A left-over `out.partial` with the
    same identity is continued (`resumed_bytes` > 0); another one is refused. `restart` discards it.
    `overwrite` lets `commit` replace an existing checkpoint directory at `out`. `shards` lays the
    tensors out otherwise than `plan_shards` does; then the caller also writes what tells where.

    `written_bytes` of `total_bytes` counts tensor data, including that of the interrupted run.

    Raises `UserError` for an existing output, a path that cannot be written, too little disk space,
    another process writing to the same place, and an interrupted run with another identity.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        tensors: Mapping[str, TensorInfo],
        *,
        identity: Mapping[str, Any] | None = None,
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
        overwrite: bool = False,
        restart: bool = False,
        shards: list[Shard] | None = None,
    ) -> None:
        # A link would be replaced by the directory instead of followed by the final rename.
        self.out = Path(os.path.realpath(out))
        self.partial = self.out.with_name(self.out.name + ".partial")
        self.tensors = dict(tensors)
        self.identity = {**(identity or {}), "max_shard_bytes": max_shard_bytes}
        self.overwrite = overwrite
        self.restart = restart
        self.total_bytes = sum(info.nbytes for info in self.tensors.values())
        self.resumed_bytes = 0
        self.committed = False
        self._order = list(self.tensors)
        self._shards = plan_shards(self.tensors, max_shard_bytes) if shards is None else shards
        self._indexed = shards is None and len(self._shards) > 1
        self._shard_of = {name: shard for shard in self._shards for name in shard.offsets}
        self._index = 0
        self._done = 0
        self.written_bytes = 0
        self._journaled = 0
        self._lock: int | None = None
        self._open: ShardFile | None = None

    @property
    def shard_files(self) -> list[str]:
        return [shard.file for shard in self._shards]

    @property
    def _discard_hint(self) -> str:
        return f"discard it with --restart or by deleting {self.partial}"

    def _path(self, shard: Shard) -> Path:
        """A shard keeps a name that no loader takes for a model until all of them are complete."""
        finished = self.partial / shard.file
        return finished if finished.exists() else self.partial / (shard.file + ".part")

    def resume_note(self) -> str:
        """What a resumed run should tell its user."""
        return (
            f"Resuming {self.partial}: {format_bytes(self.resumed_bytes)} of "
            f"{format_bytes(self.total_bytes)} are written. To begin anew, {self._discard_hint}."
        )

    def shard_paths(self) -> dict[str, Path]:
        """Where each shard lies while it is being written, by its final name."""
        return {shard.file: self._path(shard) for shard in self._shards}

    def __enter__(self) -> CheckpointWriter:
        check_output(self.out, self.overwrite)
        try:
            self._open_partial()
        except OSError as error:
            self._close()
            raise self._disk_error(error) from None
        except UserError:
            self._close()
            raise
        return self

    def _open_partial(self) -> None:
        self.partial.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.partial, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"Another process is writing to {self.partial}; wait for it or give another output."
            ) from None
        journal = self.partial / JOURNAL
        if self.restart:
            # The journal goes last, so that an interrupted clean-up is recognised as ours.
            for path in sorted(self.partial.iterdir(), key=lambda path: path == journal):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        if journal.is_file():
            self._resume(read_json(journal))
        elif any(self.partial.iterdir()):
            raise UserError(
                f"{self.partial} exists and has no journal, so it cannot be resumed; "
                f"{self._discard_hint}."
            )
        left = self.total_bytes - self.written_bytes
        free = shutil.disk_usage(self.partial).free + self._reserved_bytes()
        if left > free:
            self._remove_if_nothing_is_written()
            raise UserError(
                f"{self.out} needs {format_bytes(left)} more and its disk has "
                f"{format_bytes(free)} free."
            )
        self._journal()

    def _reserved_bytes(self) -> int:
        """Disk space that the shard being resumed already holds."""
        if self._index == len(self._order) or not self.resumed_bytes:
            return 0
        path = self._path(self._shard_of[self._order[self._index]])
        return path.stat().st_blocks * 512 if path.exists() else 0

    @functools.cached_property
    def _layout_hash(self) -> str:
        layout = [(s.file, s.header.decode("utf-8", "replace")) for s in self._shards]
        return hashlib.sha256(json.dumps([layout, self._order]).encode()).hexdigest()

    def _resume(self, journal: dict[str, Any]) -> None:
        if journal.get("version") != JOURNAL_VERSION:
            raise UserError(
                f"{self.partial / JOURNAL} has version {journal.get('version')!r}, this moekit "
                f"writes {JOURNAL_VERSION}; {self._discard_hint}."
            )
        before = journal.get("identity") or {}
        for key in sorted(set(before) | set(self.identity)):
            if before.get(key) != self.identity.get(key):
                raise UserError(
                    f"{self.partial} was begun with {key} = {before.get(key)!r}, now it is "
                    f"{self.identity.get(key)!r}. Repeat the first command to resume it, or "
                    f"{self._discard_hint}."
                )
        index, done = journal.get("cursor", (-1, 0))
        if journal.get("layout") != self._layout_hash or not 0 <= index <= len(self._order):
            raise UserError(
                f"{self.partial} was begun for other tensors (has moekit or transformers changed "
                f"since?); {self._discard_hint}."
            )
        for name in self._order[: index + bool(done)]:
            shard = self._shard_of[name]
            path = self._path(shard)
            size = path.stat().st_size if path.is_file() else 0
            if size != shard.size and self.tensors[name].nbytes:
                raise UserError(
                    f"{path} has {size} bytes, its journal expects {shard.size}; "
                    f"{self._discard_hint}."
                )
        self._index, self._done = index, done
        finished = sum(self.tensors[name].nbytes for name in self._order[:index])
        self.written_bytes = self._journaled = self.resumed_bytes = finished + done

    def pending(self) -> Iterator[tuple[str, int]]:
        """Each tensor still to be written, with its first missing row along the first axis."""
        while True:
            self._skip_finished()
            if self._index == len(self._order):
                return
            before = self._index
            name = self._order[self._index]
            yield name, self._done // self._row_bytes(name)
            self._skip_finished()
            if self._index == before:
                raise ValueError(f"{name} was not written completely")

    def left(self) -> list[tuple[str, int]]:
        """What `pending` would yield from now on, for those who make tensors ahead of writing."""
        self._skip_finished()
        names = self._order[self._index :]
        return [
            (name, 0 if number else self._done // self._row_bytes(name))
            for number, name in enumerate(names)
        ]

    def _row_bytes(self, name: str) -> int:
        info = self.tensors[name]
        return max(1, math.prod(info.shape[1:]) * info.dtype.itemsize)

    def _skip_finished(self) -> None:
        while (
            self._index < len(self._order)
            and self._done == self.tensors[self._order[self._index]].nbytes
        ):
            self._index += 1
            self._done = 0

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one whole tensor."""
        self.write_rows(name, 0, tensor)

    def write_rows(self, name: str, start: int, rows: torch.Tensor) -> None:
        """Write `rows` at row `start` of the first axis; tensors and rows in order."""
        info = self.tensors[name]
        if rows.dtype != info.dtype or tuple(rows.shape[1:]) != info.shape[1:]:
            raise ValueError(f"{name}: {rows.dtype} {list(rows.shape)} does not fit {info}")
        self._skip_finished()
        position = start * self._row_bytes(name)
        if self._order[self._index : self._index + 1] != [name] or self._done != position:
            raise ValueError(f"{name} is out of order at row {start}")
        if position + rows.nbytes > info.nbytes:
            raise ValueError(f"{name}: {list(rows.shape)} from row {start} is too much")
        try:
            shard = self._shard_of[name]
            self._file(shard).write(rows, shard.offsets[name] + position)
        except OSError as error:
            raise self._disk_error(error) from None
        self._done += rows.nbytes
        self.written_bytes += rows.nbytes
        if self.written_bytes - self._journaled >= JOURNAL_BYTES:
            self._journal()

    def _file(self, shard: Shard) -> ShardFile:
        if self._open is None or self._open.shard is not shard:
            self._close_shard()
            self._open = ShardFile(self._path(shard), shard)
        return self._open

    def _journal(self) -> None:
        """Make what is written durable, then say so in the journal."""
        if self._open is not None:
            self._open.sync()
        content = {
            "version": JOURNAL_VERSION,
            "identity": self.identity,
            "layout": self._layout_hash,
            "cursor": [self._index, self._done],
            "written_bytes": self.written_bytes,
            "total_bytes": self.total_bytes,
        }
        temporary = self.partial / (JOURNAL + ".tmp")
        write_durably(temporary, json.dumps(content, indent=1).encode())
        os.replace(temporary, self.partial / JOURNAL)
        fsync(self.partial)
        self._journaled = self.written_bytes

    def write_file(self, name: str, data: str | bytes) -> None:
        """Write a small file (config, record, tokenizer, ...) beside the shards."""
        path = self.partial / name
        try:
            path.parent.mkdir(exist_ok=True)
            write_durably(path, data.encode() if isinstance(data, str) else data)
        except OSError as error:
            raise self._disk_error(error) from None

    def commit(self) -> None:
        """Write the index, make everything durable and let `out` appear."""
        self._skip_finished()
        if self._index < len(self._order):
            raise ValueError(f"{self._order[self._index]} is not written")
        check_output(self.out, self.overwrite)
        try:
            for shard in self._shards:
                # A shard without a single byte of data has not been opened yet.
                if not self._path(shard).exists():
                    self._file(shard)
            self._close_shard()
            self._journal()
            if self._indexed:
                weight_map = {name: self._shard_of[name].file for name in self._order}
                metadata = {"total_size": self.total_bytes}
                index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
                self.write_file(INDEX_FILE, json.dumps(index, indent=2) + "\n")
            for shard in self._shards:
                os.replace(self._path(shard), self.partial / shard.file)
            fsync(self.partial)
            self._rename()
        except OSError as error:
            raise self._disk_error(error) from None
        self.committed = True

    def _rename(self) -> None:
        replaced = self.out.with_name(self.out.name + ".replaced")
        if self.out.is_dir() and any(self.out.iterdir()):
            shutil.rmtree(replaced, ignore_errors=True)
            os.rename(self.out, replaced)
        os.rename(self.partial, self.out)
        fsync(self.out.parent)
        # Only now: a crash before the rename must still find its journal.
        (self.out / JOURNAL).unlink()
        shutil.rmtree(replaced, ignore_errors=True)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self.committed:
            # The disk may be full or gone; the last durable journal is then what counts.
            with contextlib.suppress(OSError):
                self._journal()
            with contextlib.suppress(OSError):
                self._remove_if_nothing_is_written()
        self._close()
        if isinstance(error, KeyboardInterrupt) and self.partial.exists():
            raise WriteInterrupted(
                f"Interrupted: {self.partial} holds {format_bytes(self.written_bytes)} of "
                f"{format_bytes(self.total_bytes)}. The same command resumes it; "
                f"{self._discard_hint}."
            ) from None

    def _remove_if_nothing_is_written(self) -> None:
        if self.written_bytes == 0:
            shutil.rmtree(self.partial)

    def _close_shard(self) -> None:
        if self._open is not None:
            # Forgotten first: what cannot be closed must not be closed again.
            file, self._open = self._open, None
            file.close()

    def _close(self) -> None:
        with contextlib.suppress(OSError):
            self._close_shard()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _disk_error(self, error: OSError) -> UserError:
        if error.errno in _NO_ROOM:
            free = shutil.disk_usage(self.partial.parent).free
            return UserError(
                f"The disk of {self.out} is full after {format_bytes(self.written_bytes)} of "
                f"{format_bytes(self.total_bytes)} ({format_bytes(free)} free). Free some space "
                f"and run the same command to resume, or {self._discard_hint}."
            )
        return UserError(f"{self.out} cannot be written: {error.strerror} ({error.filename}).")
