"""Models packed on the fly, kept in a cache directory until their source changes."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from moekit.core.checkpoint import Checkpoint
from moekit.core.errors import UserError
from moekit.core.pack import pack
from moekit.core.packed_header import ENCODED_VERSION, PLAIN_VERSION
from moekit.core.write_model import state_of

FOLDER = "packed"


def cache_directory() -> Path:
    """`$MOEKIT_CACHE`, by default `~/.cache/moekit`."""
    return Path(os.environ.get("MOEKIT_CACHE") or Path.home() / ".cache" / "moekit")


def packed_copy(
    source: Path,
    codec: str,
    group_size: int,
    *,
    resident_codec: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> Path:
    """The packed form of the model in directory `source`; made at the first call.

    Its name contains the state of the source's files, the codecs and the group size, so a changed
    source is packed again. The directory appears only when it is complete; an interrupted packing
    goes on at the next call, and two processes do not pack the same model at once. Raises
    UserError as `pack` does.
    """
    with Checkpoint(source) as checkpoint:
        parts = [PLAIN_VERSION, codec, group_size, state_of(checkpoint)]
    if resident_codec is not None:
        parts += [ENCODED_VERSION, resident_codec]
    name = re.sub(r"[^\w.-]+", "-", source.resolve().name)
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    target = cache_directory() / FOLDER / f"{name}-{codec}-{digest}"
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.with_name(f"{target.name}.lock").touch()
    except OSError as error:
        raise UserError(
            f"{target.parent} cannot be written to ({error.strerror}); set MOEKIT_CACHE to another "
            "directory, or pack the model yourself with `moekit convert --to packed`"
        ) from None
    with _alone(target.with_name(f"{target.name}.lock")):
        if not target.is_dir():
            if note is not None:
                note(f"packing {source} with {codec} into {target}")
            pack(
                source,
                target,
                codec=codec,
                group_size=group_size,
                resident_codec=resident_codec,
                progress=progress,
                note=note,
            )
    return target


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, waiting for whoever has it; it stays, empty."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
