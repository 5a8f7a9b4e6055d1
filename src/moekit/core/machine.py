"""The memory of this machine that this process may use, and what it is charged for now.

Limits of control groups count, in both versions of them, at every level up to the root.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from moekit.core.errors import UserError

_CGROUPS = Path("/sys/fs/cgroup")
# Version 1 writes "no limit" as the largest multiple of a page.
_NO_LIMIT = 2**60
_PROGRAM_FILES = 2**28


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that this process may still take without swapping or being killed.

    The least of what the system says is available and what each control group of the process
    leaves. Linux only; raises UserError elsewhere. `root` stands for / in tests.
    """
    path = root / "proc/meminfo"
    try:
        text = path.read_text()
    except FileNotFoundError as error:
        raise UserError(f"the memory of this machine is unknown ({error}): give bytes") from None
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", text, re.MULTILINE)
    if found is None:
        raise UserError(f"{path} names no available memory: give bytes")
    left = [int(found[1]) * 1024]
    for group in _groups(root):
        limit = _limit(group)
        if limit < _NO_LIMIT:
            left.append(max(0, limit - _usage(group)))
    return min(left)


def charged_memory(root: Path = Path("/")) -> int:
    """Bytes that this process holds now: what its control group is charged, page cache included,
    where the group has no other process; else its resident pages.

    Files that are not mapped count up to what starting a program reads: beyond it they are large
    files that were read or written before, and are given up when the memory is needed.
    """
    group = next(_groups(root), None)
    if group is not None:
        members = _read(group / "cgroup.procs").split()
        if members == [str(os.getpid())]:
            idle = _files(group) - _stat(group, "mapped_file", "file_mapped")
            return _used(group) - max(0, idle - _PROGRAM_FILES)
    status = (root / "proc/self/status").read_text()
    found = re.search(r"^VmRSS:\s+(\d+) kB$", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def _groups(root: Path) -> Iterator[Path]:
    """Directories of the memory control groups of this process, the innermost first."""
    base = root / _CGROUPS.relative_to("/")
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount = base if (base / "cgroup.controllers").exists() else base / "unified"
        elif "memory" in controllers.split(","):
            mount = base / "memory"
        else:
            continue
        # Inside a container the path may be that of the host, which is not mounted there.
        group = mount / path.strip("/")
        group = group if group.is_dir() else mount
        while group.is_relative_to(mount):
            if _name(group, "usage") is not None:
                yield group
            group = group.parent


def _name(group: Path, what: str) -> Path | None:
    names = {
        "usage": ("memory.current", "memory.usage_in_bytes"),
        "limit": ("memory.max", "memory.limit_in_bytes"),
    }
    return next((group / name for name in names[what] if (group / name).exists()), None)


def _limit(group: Path) -> int:
    path = _name(group, "limit")
    text = _read(path).strip() if path is not None else ""
    return int(text) if text.isdigit() else _NO_LIMIT


def _used(group: Path) -> int:
    path = _name(group, "usage")
    return int(_read(path)) if path is not None else 0


def _usage(group: Path) -> int:
    """What a group is charged without the pages of files, which it gives up before it kills; as
    what the system says is available counts them."""
    return max(0, _used(group) - _files(group))


def _files(group: Path) -> int:
    return _stat(group, "active_file") + _stat(group, "inactive_file")


def _stat(group: Path, *names: str) -> int:
    """The first of `names` that a group has a number for, groups below it included, or 0."""
    stat = dict(line.split() for line in _read(group / "memory.stat").splitlines())
    # Version 1 has the group alone by the plain name.
    wanted = (f"{prefix}{name}" for prefix in ("total_", "") for name in names)
    return next((int(stat[name]) for name in wanted if name in stat), 0)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
