"""`RunRecord`: what was run, with what, on what, and what came out, as `record.json`."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moekit.core.errors import UserError
from moekit.core.forecast import Hardware

RECORD_FILE = "record.json"
VERSION = 1
PACKAGES = ("moekit", "torch", "transformers", "safetensors", "numpy")

# Files above this size are hashed by their size and samples, so that a record of a 600 GB
# checkpoint takes seconds; a sampled hash finds another or a truncated file, not one flipped bit.
WHOLE_BYTES = 64 * 2**20
SAMPLE_BYTES = 2**20
SAMPLES = 16


@dataclass(frozen=True)
class FileHash:
    """One file: its name, size, and SHA-256 of its content or (`sampled`) of size and samples."""

    name: str
    bytes: int
    sha256: str
    sampled: bool

    @classmethod
    def of(cls, path: str | os.PathLike[str], name: str | None = None) -> FileHash:
        """Hash one file; `name` defaults to the path as given."""
        size = os.path.getsize(path)
        digest = hashlib.sha256()
        sampled = size > WHOLE_BYTES
        with open(path, "rb") as file:
            if sampled:
                digest.update(str(size).encode())
                for number in range(SAMPLES):
                    # From the first byte to the last, evenly.
                    file.seek((size - SAMPLE_BYTES) * number // (SAMPLES - 1))
                    digest.update(file.read(SAMPLE_BYTES))
            else:
                while block := file.read(2**20):
                    digest.update(block)
        return cls(name or str(path), size, digest.hexdigest(), sampled)


def hash_files(paths: Iterable[str | os.PathLike[str]]) -> list[FileHash]:
    """Hash files, and the files directly inside directories, in the order of their names."""
    found: list[FileHash] = []
    for path in map(Path, paths):
        inside = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
        found += [FileHash.of(file) for file in inside]
    return found


@dataclass
class RunRecord:
    """Everything needed to repeat a run and to tell whether two runs are comparable.

    `started` is UTC in ISO 8601, `seconds` wall time, `hardware` a `Hardware`. Made by
    `start_record`, completed by `finish`, written by `save`.
    """

    command: str
    options: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    hardware: dict[str, Any] = field(default_factory=dict)
    inputs: list[FileHash] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    artefacts: list[FileHash] = field(default_factory=list)
    started: str = ""
    seconds: float = 0.0
    version: int = VERSION
    _start: float = field(default_factory=time.monotonic, repr=False, compare=False)

    def finish(
        self,
        metrics: Mapping[str, Any] | None = None,
        artefacts: Iterable[FileHash | str | os.PathLike[str]] = (),
    ) -> RunRecord:
        """Add results and the time since `start_record`; paths among `artefacts` are hashed."""
        self.metrics |= metrics or {}
        self.artefacts += [a if isinstance(a, FileHash) else FileHash.of(a) for a in artefacts]
        self.seconds = round(time.monotonic() - self._start, 3)
        return self

    def to_json(self) -> str:
        content = {key: value for key, value in dataclasses.asdict(self).items() if key[:1] != "_"}
        return json.dumps(content, indent=2, default=str) + "\n"

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write `record.json` into `directory`."""
        path = Path(directory) / RECORD_FILE
        path.write_text(self.to_json(), encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RunRecord:
        """Read a record from its file or directory; `UserError` for anything else."""
        file = Path(path) / RECORD_FILE if Path(path).is_dir() else Path(path)
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{file} cannot be read as a run record: {error}") from None
        names = {f.name for f in dataclasses.fields(cls)} - {"_start"}
        if not isinstance(content, dict) or set(content) != names:
            raise UserError(f"{file} is no run record.")
        if content["version"] != VERSION:
            raise UserError(
                f"{file} has version {content['version']!r}; this moekit reads version {VERSION}."
            )
        try:
            for key in ("inputs", "artefacts"):
                content[key] = [FileHash(**item) for item in content[key]]
        except TypeError as error:
            raise UserError(f"{file} is no run record: {error}") from None
        return cls(**content)


def start_record(
    command: str,
    options: Mapping[str, Any] | None = None,
    *,
    seed: int | None = None,
    inputs: Iterable[str | os.PathLike[str]] = (),
) -> RunRecord:
    """A record of a run that begins now; `inputs` are files or directories to hash."""
    return RunRecord(
        command=command,
        options=json.loads(json.dumps(dict(options or {}), default=str)),
        seed=seed,
        versions=versions(),
        hardware=Hardware.read().to_dict(),
        inputs=hash_files(inputs),
        started=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide results."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
