"""Making predictors by name, and keeping what they learned: `predictor.json` and safetensors."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from moekit.core.errors import UserError
from moekit.core.method_text import parse_method
from moekit.core.registry import registry
from moekit.core.trace import RoutingTrace
from moekit.runtime.predict.gates import Gate
from moekit.runtime.predict.predictor import Predictor

FORMAT = "moekit.predictor"
VERSION = 1
HEADER = "predictor.json"
TENSORS = "predictor.safetensors"


def make_predictor(
    text: str,
    *,
    gates: Sequence[Gate] | None = None,
    traces: Sequence[RoutingTrace] | None = None,
    **options: Any,
) -> Predictor:
    """A predictor by name ("edgemoe"), with options ("edgemoe:order=1"), or from the directory that
    `save_predictor` wrote.

    It gets the model's `gates`, or is fitted to `traces`, if it needs them. Raises UserError for an
    unknown name or option, and where gates or traces are missing.
    """
    if (Path(text) / HEADER).is_file():
        return load_predictor(text)
    name, given = parse_method(text)
    options = {**given, **options}
    build = registry.find(name, kind="predictor").load()
    if "gates" in inspect.signature(build).parameters:
        if gates is None:
            raise UserError(f"predictor {name} needs the model's routers")
        options["gates"] = gates
    try:
        predictor = build(**options)
    except TypeError as error:
        raise UserError(f"predictor {name}: {error}") from None
    if predictor.learns:
        if not traces:
            raise UserError(
                f"predictor {name} learns from routing: give a trace of the model (`moekit trace`)"
            )
        predictor.fit(traces)
    return predictor


def save_predictor(predictor: Predictor, name: str, path: str | Path) -> None:
    """Write what `predictor`, made as `name`, has learned into the new directory `path`.

    Raises UserError for one that learns nothing and where the directory cannot be written.
    """
    if not predictor.learns:
        raise UserError(f"predictor {name} learns nothing that could be saved")
    directory = Path(path)
    try:
        directory.mkdir(parents=True)
        save_file(predictor.state(), directory / TENSORS)
        header = {"format": FORMAT, "version": VERSION, "name": name}
        (directory / HEADER).write_text(json.dumps(header) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {directory}: {error}") from None


def load_predictor(path: str | Path) -> Predictor:
    """The predictor that `save_predictor` wrote; UserError for anything else."""
    directory = Path(path)
    try:
        header = json.loads((directory / HEADER).read_text(encoding="utf-8"))
        state = load_file(directory / TENSORS)
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise UserError(f"{directory} cannot be read as a predictor: {error}") from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise UserError(f"{directory / HEADER} is no header of a predictor")
    if header.get("version") != VERSION:
        raise UserError(
            f"{directory} has version {header.get('version')!r}; this moekit reads version "
            f"{VERSION}: fit the predictor again"
        )
    predictor = registry.find(str(header.get("name")), kind="predictor").load()()
    try:
        predictor.restore(state)
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"{directory} is damaged: {error}") from None
    return predictor
