"""Reading text to measure on: JSONL, plain text, directories of both, or standard input."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from moekit.core.errors import UserError
from moekit.core.seeds import derive_seed

JSONL_SUFFIXES = {".jsonl", ".ndjson"}


@dataclass(frozen=True, slots=True)
class Sample:
    """One document and the domain it is counted under."""

    text: str
    domain: str


def read_texts(paths: str | Path | Iterable[str | Path]) -> list[Sample]:
    """Read every document of files, directories (their files, sorted by name) or `-` (stdin).

    A JSONL file holds one object a line with a string field "text"; any other file is one
    document. The domain is the file name up to its first dot. Empty documents are dropped.
    Raises UserError for a missing or unreadable file, bad UTF-8, bad JSON, or no text at all.
    """
    if isinstance(paths, str | Path):
        paths = [paths]
    names = [str(path) for path in paths]
    samples = [sample for name in names for sample in _read_one(name) if sample.text]
    if not samples:
        raise UserError(f"{', '.join(names) or 'DATA'}: no text found (0 non-empty documents)")
    return samples


def domain_of(path: Path) -> str:
    """The file name up to its first dot: `web-fr.valid.jsonl` is domain `web-fr`."""
    return path.name.lstrip(".").split(".", 1)[0] or path.name


def limit_bytes_per_domain(samples: Iterable[Sample], max_bytes: int) -> list[Sample]:
    """The leading `max_bytes` UTF-8 bytes of each domain, cut at a character boundary."""
    left: dict[str, int] = {}
    kept = []
    for sample in samples:
        room = left.setdefault(sample.domain, max_bytes)
        raw = sample.text.encode()[:room]
        left[sample.domain] = room - len(raw)
        text = raw.decode(errors="ignore")
        if text:
            kept.append(Sample(text, sample.domain))
    return kept


def shuffled(samples: Iterable[Sample], seed: int) -> list[Sample]:
    """The documents in an order drawn by `seed`, so that a part of them is a random sample.

    Which document of a domain comes at which place depends on that domain's documents alone.
    """
    by_domain: dict[str, list[Sample]] = {}
    for sample in samples:
        by_domain.setdefault(sample.domain, []).append(sample)
    for domain, documents in by_domain.items():
        random.Random(derive_seed(seed, f"documents of {domain}")).shuffle(documents)
    return [sample for documents in by_domain.values() for sample in documents]


def _read_one(name: str) -> list[Sample]:
    if name == "-":
        return [Sample(_decode(sys.stdin.buffer.read(), "standard input"), "stdin")]
    path = Path(name)
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith("."))
        return [sample for file in files for sample in _read_file(file)]
    if not path.exists():
        raise UserError(f"{name}: no such file or directory")
    return _read_file(path)


def _read_file(path: Path) -> list[Sample]:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    text = _decode(raw, str(path))
    domain = domain_of(path)
    if path.suffix.lower() not in JSONL_SUFFIXES:
        return [Sample(text, domain)]
    return [
        Sample(_text_field(line, f"{path}:{number}"), domain)
        # Not splitlines(): JSON strings may hold U+2028 and friends unescaped.
        for number, line in enumerate(text.split("\n"), start=1)
        if line.strip()
    ]


def _decode(raw: bytes, name: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name}: not UTF-8 text (byte {error.start} is 0x{raw[error.start]:02x})"
        ) from error


def _text_field(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON ({error.msg}, column {error.colno})") from error
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise UserError(f'{where}: expected an object with a string field "text"')
    return text
