"""The files of `ExpertStats`: `stats.json`, the cheap statistics, and a file a layer for the rest.

Written aside and renamed when complete; headers are validated before anything is used.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from moekit.core.checkpoint import DTYPE_NAMES, read_header
from moekit.core.errors import UserError
from moekit.core.stats import ExpertStats, Lazy, StatsLayer
from moekit.core.stats_table import RATIO_BINS, STATISTICS

FORMAT = "moekit.stats"
VERSION = 1
HEADER = "stats.json"
CHEAP_FILE = "stats.safetensors"
LAYER_FILE = re.compile(r"layer-\d{5}\.safetensors")


def layer_file(position: int) -> str:
    """The file that holds the heavy statistics of a layer."""
    return f"layer-{position:05d}.safetensors"


def save_stats(stats: ExpertStats, out: Path) -> None:
    """Write `out` by way of `OUT.partial`; one layer of heavy statistics in memory at a time."""
    if out.exists():
        raise UserError(f"{out} exists already; choose another output or remove it.")
    directory = out.with_name(out.name + ".partial")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _clear(directory)
        cheap = {k: v for k, v in stats.held.items() if not STATISTICS[k[1]].heavy}
        _write(directory / CHEAP_FILE, {_key(*k): _loaded(v) for k, v in cheap.items()})
        files = [CHEAP_FILE]
        for position in range(len(stats.layers)):
            heavy = {
                _key(*k): _loaded(v)
                for k, v in stats.held.items()
                if k[0] == position and STATISTICS[k[1]].heavy
            }
            if heavy:
                files.append(layer_file(position))
                _write(directory / files[-1], heavy)
        header = {
            "format": FORMAT,
            "version": VERSION,
            "model_type": stats.model_type,
            "layers": [asdict(layer) for layer in stats.layers],
            "domains": stats.domains,
            "settings": stats.settings,
            "metadata": stats.metadata,
            "files": files,
        }
        with open(directory / HEADER, "w", encoding="utf-8") as file:
            json.dump(header, file, ensure_ascii=False, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(directory, out)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {out}: {error}") from error


def _clear(directory: Path) -> None:
    for entry in directory.iterdir():
        known = entry.name in {HEADER, CHEAP_FILE} or LAYER_FILE.fullmatch(entry.name)
        if not known:
            raise UserError(
                f"{directory} holds {entry.name}, which is no part of stats; remove it."
            )
        entry.unlink()


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    # Clones: two statistics may share memory, which the format refuses.
    save_file({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, path)


def _loaded(value: Tensor | Lazy) -> Tensor:
    return value.load() if isinstance(value, Lazy) else value


def _key(position: int, name: str) -> str:
    return f"{position}.{name}"


def open_stats(path: Path) -> ExpertStats:
    """Read the header and the cheap statistics; check every file against the header."""
    if not (path / HEADER).is_file():
        raise UserError(f"{path} holds no stats: it has no {HEADER}.")
    try:
        content = json.loads((path / HEADER).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path / HEADER} cannot be read: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path / HEADER} is not the header of moekit stats.")
    if content.get("version") != VERSION:
        raise UserError(
            f"{path / HEADER} has format version {content.get('version')!r}; this moekit reads "
            f"version {VERSION}."
        )
    try:
        stats = ExpertStats(
            str(content["model_type"]),
            [_layer(layer) for layer in content["layers"]],
            [str(domain) for domain in content["domains"]],
            dict(content["settings"]),
            dict(content["metadata"]),
        )
        files = [str(name) for name in content["files"]]
        moments = len(stats.moments)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path / HEADER} is damaged: {error!r}") from error
    for name in files:
        if name != CHEAP_FILE and not LAYER_FILE.fullmatch(name):
            raise UserError(f"{path / HEADER} is damaged: {name!r} is no file of stats.")
        _open_file(stats, path / name, moments)
    return stats


def _layer(raw: dict[str, Any]) -> StatsLayer:
    numbers = {k: raw[k] for k in ("index", "num_experts", "num_choices", "top_k")}
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers.values()):
        raise ValueError(f"layer {raw!r}")
    return StatsLayer(name=str(raw["name"]), **numbers)


def _open_file(stats: ExpertStats, path: Path, num_moments: int) -> None:
    if not path.is_file():
        raise UserError(f"{path.parent} is incomplete: {path.name} is missing.")
    header = read_header(path)
    cheap = load_file(path) if path.name == CHEAP_FILE else {}
    for key, entry in header.items():
        position, _, name = key.partition(".")
        known = name in STATISTICS and position.isdigit() and int(position) < len(stats.layers)
        shape = entry.shape
        if not known or not _fits(stats, int(position), name, entry, num_moments):
            raise UserError(f"{path}: {key!r} with shape {list(shape)} does not fit {HEADER}.")
        stats.held[int(position), name] = cheap.get(
            key, Lazy(shape, partial(_read, path, key), partial(_read_row, path, key))
        )


def _fits(stats: ExpertStats, position: int, name: str, entry: Any, num_moments: int) -> bool:
    layer, shape = stats.layers[position], entry.shape
    sizes = {
        "G": len(stats.domains),
        "C": layer.num_choices,
        "E": layer.num_experts,
        "M": num_moments,
        "B": RATIO_BINS,
        "P": stats.layers[position - 1].num_choices if position else -1,
    }
    axes = STATISTICS[name].axes
    if len(axes) != len(shape) or entry.dtype_name != DTYPE_NAMES[STATISTICS[name].dtype]:
        return False
    # D, F and H are widths of the model, which the header does not repeat.
    return all(sizes.setdefault(axis, size) == size for axis, size in zip(axes, shape, strict=True))


def _read(path: Path, key: str) -> Tensor:
    with _opened(path) as file:
        return file.get_tensor(key)


def _read_row(path: Path, key: str, row: int) -> Tensor:
    with _opened(path) as file:
        return file.get_slice(key)[row]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read any more: {error}") from error
