"""The files of a trace: `trace.json` and its chunks, written aside and validated before use."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moekit.core.errors import UserError

FORMAT = "moekit.trace"
VERSION = 1
HEADER = "trace.json"
CHUNK_NAME = re.compile(r"chunk-\d{5,}\.safetensors")


@dataclass(frozen=True)
class TraceLayer:
    """One MoE layer of a trace; `index` is the decoder layer, `name` the module path."""

    index: int
    name: str
    num_experts: int
    num_choices: int
    top_k: int


@dataclass
class TraceHeader:
    """What `trace.json` says besides the list of chunks; samples as lengths and domain numbers."""

    model_type: str = ""
    layers: list[TraceLayer] = field(default_factory=list)
    logits: bool = False
    lengths: list[int] = field(default_factory=list)
    sample_domains: list[int] = field(default_factory=list)
    domains: list[str] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)

    def widths(self) -> dict[str, int | None]:
        """Every tensor of a chunk with its row width, None where it has one value a token."""
        widths: dict[str, int | None] = {"tokens": None, "phase": None}
        for position, layer in enumerate(self.layers):
            widths[f"ids.{position}"] = widths[f"weights.{position}"] = layer.top_k
            if self.logits:
                widths[f"logits.{position}"] = layer.num_choices
        return widths


class Chunk(Protocol):
    """A run of tokens, in memory or in a file."""

    @property
    def num_tokens(self) -> int: ...

    def read(self, name: str, start: int, stop: int) -> Tensor: ...


@dataclass(frozen=True)
class MemoryChunk:
    tensors: dict[str, Tensor]

    @property
    def num_tokens(self) -> int:
        return len(self.tensors["tokens"])

    def read(self, name: str, start: int, stop: int) -> Tensor:
        return self.tensors[name][start:stop]


@dataclass(frozen=True)
class FileChunk:
    path: Path
    num_tokens: int

    def read(self, name: str, start: int, stop: int) -> Tensor:
        with safe_open(self.path, framework="pt") as file:
            return file.get_slice(name)[start:stop]


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """Yield `OUT.partial`, renamed to `OUT` on success; it stays, and is reused, after a failure.

    Raises UserError when `out` exists, or when the partial directory holds anything but a trace.
    """
    directory = begin_directory(out)
    yield directory
    finish_directory(directory, out)


def begin_directory(out: Path) -> Path:
    """Make an empty `OUT.partial`, throwing away one that an interrupted trace left."""
    if out.exists():
        raise UserError(f"{out} exists already; choose another output or remove it.")
    directory = out.with_name(out.name + ".partial")
    try:
        if directory.exists():
            foreign = [
                entry.name
                for entry in directory.iterdir()
                if entry.name != HEADER and not CHUNK_NAME.fullmatch(entry.name)
            ]
            if foreign:
                raise UserError(f"{directory} holds {foreign[0]}, which is no trace; remove it.")
            shutil.rmtree(directory)
        directory.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot write {directory}: {error.strerror}.") from error
    return directory


def finish_directory(directory: Path, out: Path) -> None:
    """Give a complete partial directory its final name."""
    os.replace(directory, out)


def write_chunk(directory: Path, number: int, tensors: dict[str, Tensor]) -> FileChunk:
    """Write one chunk file."""
    path = directory / f"chunk-{number:05d}.safetensors"
    try:
        save_file({name: t.contiguous() for name, t in tensors.items()}, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {path}: {error}") from error
    return FileChunk(path, len(tensors["tokens"]))


def write_header(directory: Path, header: TraceHeader, sizes: list[int]) -> None:
    """Write `trace.json` for chunks of these sizes; it comes last."""
    chunks = [
        {"file": f"chunk-{number:05d}.safetensors", "num_tokens": size}
        for number, size in enumerate(sizes)
    ]
    content = {"format": FORMAT, "version": VERSION, **asdict(header), "chunks": chunks}
    with open(directory / HEADER, "w", encoding="utf-8") as file:
        json.dump(content, file, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())


def open_chunks(path: Path) -> tuple[TraceHeader, list[Chunk]]:
    """Read the header of the trace at `path` and check every chunk against it.

    Raises UserError that names the file and what is wrong with it.
    """
    if not (path / HEADER).is_file():
        raise UserError(f"{path} is no trace: it has no {HEADER}.")
    try:
        content = json.loads((path / HEADER).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path / HEADER} cannot be read: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path / HEADER} is not the header of a moekit trace.")
    if content.get("version") != VERSION:
        raise UserError(
            f"{path / HEADER} has format version {content.get('version')!r}; this moekit reads "
            f"version {VERSION}."
        )
    try:
        header = _header(content)
        sizes = {str(c["file"]): _count(c["num_tokens"]) for c in content["chunks"]}
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path / HEADER} is damaged: {error!r}") from error
    if sum(sizes.values()) != sum(header.lengths) or not sizes:
        raise UserError(
            f"{path / HEADER} is damaged: its chunks hold {sum(sizes.values())} tokens and its "
            f"samples {sum(header.lengths)}."
        )
    return header, [_checked(path, name, size, header) for name, size in sizes.items()]


def _header(content: dict[str, Any]) -> TraceHeader:
    layers = [
        TraceLayer(
            _count(layer["index"]),
            str(layer["name"]),
            _count(layer["num_experts"]),
            _count(layer["num_choices"]),
            _count(layer["top_k"]),
        )
        for layer in content["layers"]
    ]
    header = TraceHeader(
        str(content["model_type"]),
        layers,
        bool(content["logits"]),
        [_count(n) for n in content["lengths"]],
        [_count(n) for n in content["sample_domains"]],
        [str(d) for d in content["domains"]],
        dict(content["metadata"]),
    )
    if len(header.lengths) != len(header.sample_domains):
        raise ValueError(f"{len(header.lengths)} lengths, {len(header.sample_domains)} domains")
    if header.sample_domains and max(header.sample_domains) >= len(header.domains):
        raise ValueError(f"domain {max(header.sample_domains)} of {len(header.domains)}")
    return header


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value


def _checked(path: Path, name: str, size: int, header: TraceHeader) -> FileChunk:
    if not CHUNK_NAME.fullmatch(name):
        raise UserError(f"{path / HEADER} is damaged: {name!r} is no chunk name.")
    try:
        with safe_open(path / name, framework="pt") as file:
            names = file.keys()
            found = {key: tuple(file.get_slice(key).get_shape()) for key in names}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path / name} is missing or truncated: {error}") from error
    for key, width in header.widths().items():
        expected = (size,) if width is None else (size, width)
        if found.get(key) != expected:
            raise UserError(
                f"{path / name}: {key} is {found.get(key, 'missing')}, expected {expected}."
            )
    return FileChunk(path / name, size)
