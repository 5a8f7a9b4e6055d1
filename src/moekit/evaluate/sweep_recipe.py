"""The recipe of a sweep: which runs, on which seeds, calibrated and measured on which text.

::

    model: babel
    seeds: [0, 1, 2]
    calibrate: {data: [train/], max_tokens: 50000, sets: [default, outputs]}
    evaluate: {data: [valid/], max_bytes: 20000}
    runs:
      - {verb: compress prune, method: [reap, frequency, random], ratio: [0.25, 0.5]}
      - {verb: compress quantize, method: [rtn, gptq], codec: [int4, int3]}
      - {verb: upcycle, method: [sparse, drop], experts: 8}
      - {verb: merge, recipe: [ties.yaml, dare.yaml]}

A run is a verb and its options as on the command line. A list stands for one run of each value,
several lists for all their combinations. The runs of one seed share their calibration: documents of
`calibrate` drawn by that seed.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moekit.core.errors import UserError

# What the sweep itself says in every run.
OWN_OPTIONS = ("data", "eval", "json", "out", "seed", "stats")
LONGEST_NAME = 120


@dataclass(frozen=True)
class CalibrateRecipe:
    """Text and statistics that the runs of one seed share; `sets` as of `moekit profile`."""

    data: tuple[str, ...]
    max_tokens: int = 50_000
    sets: tuple[str, ...] = ("default",)
    seq_len: int | None = None


@dataclass(frozen=True)
class EvaluateRecipe:
    """Text that every result is measured on; `max_bytes` the leading bytes of each domain."""

    data: tuple[str, ...]
    max_bytes: int | None = None


@dataclass(frozen=True)
class SweepRun:
    """One run: words of the verb, and its options without the seed."""

    verb: tuple[str, ...]
    options: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        """What its directory is called; the seed comes after."""
        # Of a recipe's path its name says enough, and a path may be longer than a name can be.
        told = {k: Path(str(v)).stem if k == "recipe" else v for k, v in self.options}
        parts = [*self.verb[-1:], *(f"{key}-{value}" for key, value in told.items())]
        return re.sub(r"[^A-Za-z0-9.]+", "-", "_".join(map(str, parts)))[:LONGEST_NAME].strip("-")

    def arguments(self, without: str | None = None) -> list[str]:
        """The options as on the command line, but for the one that `without` names."""
        found: list[str] = []
        for key, value in self.options:
            if key == without:
                continue
            name = f"--{key.replace('_', '-')}"
            if value is True:
                found.append(name)
            elif value is not False and value is not None:
                found += [name, str(value)]
        return found


@dataclass(frozen=True)
class SweepRecipe:
    """Everything a sweep does; made by `load_sweep`."""

    model: str
    runs: tuple[SweepRun, ...]
    evaluate: EvaluateRecipe
    calibrate: CalibrateRecipe | None = None
    seeds: tuple[int, ...] = (0,)


def load_sweep(path: Path, verbs: tuple[str, ...]) -> SweepRecipe:
    """The sweep in YAML file `path`; `verbs` are those a run may name.

    Raises `UserError` naming the field for anything unknown, missing or of the wrong type, and for
    two runs that are the same.
    """
    import yaml

    try:
        raw = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"recipe {path} is not valid YAML: {error}") from None
    _check_keys(raw, SweepRecipe, str(path))
    for name in ("model", "runs", "evaluate"):
        if not raw.get(name):
            raise UserError(f"recipe {path} lacks '{name}'.")
    seeds = raw.get("seeds", [0])
    if not isinstance(seeds, list) or not all(type(s) is int and s >= 0 for s in seeds):
        raise UserError(f"recipe {path}: seeds is {seeds!r}, not a list of whole numbers from 0.")
    if len(set(seeds)) < len(seeds):
        raise UserError(f"recipe {path}: seeds {seeds} name one twice.")
    if not isinstance(raw["runs"], list):
        raise UserError(f"recipe {path}: runs is no list.")
    runs = [run for number, one in enumerate(raw["runs"]) for run in _expand(one, number, verbs)]
    names = [run.name for run in runs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"recipe {path}: two runs are {twice}; take one out.")
    calibrate = raw.get("calibrate")
    return SweepRecipe(
        str(raw["model"]),
        tuple(runs),
        _section(EvaluateRecipe, raw["evaluate"], "evaluate"),
        None if calibrate is None else _section(CalibrateRecipe, calibrate, "calibrate"),
        tuple(seeds),
    )


def _expand(raw: Any, number: int, verbs: tuple[str, ...]) -> list[SweepRun]:
    where = f"runs[{number}]"
    if not isinstance(raw, Mapping) or "verb" not in raw:
        raise UserError(f"{where} is {raw!r}, not a mapping with a verb.")
    verb = str(raw["verb"])
    if verb not in verbs:
        near = difflib.get_close_matches(verb, verbs, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(verbs)}"
        raise UserError(f"{where}: verb {verb!r} cannot be swept: {hint}")
    own = [key for key in raw if str(key).replace("-", "_") in OWN_OPTIONS]
    if own:
        raise UserError(f"{where}: {own[0]} is the sweep's own; take it out of the run.")
    keys = [key for key in raw if key != "verb"]
    values = [raw[key] if isinstance(raw[key], list) else [raw[key]] for key in keys]
    if not all(values):
        raise UserError(f"{where}: {keys[values.index([])]} is an empty list.")
    return [
        SweepRun(tuple(verb.split()), tuple(zip(map(str, keys), chosen, strict=True)))
        for chosen in itertools.product(*values)
    ]


def _section(cls: Any, raw: Any, where: str) -> Any:
    _check_keys(raw, cls, where)
    data = raw.get("data")
    if isinstance(data, str):
        data = [data]
    if not isinstance(data, list) or not data:
        raise UserError(f"{where}.data is {data!r}; give a list of files or directories.")
    values = {**raw, "data": tuple(map(str, data))}
    if isinstance(values.get("sets"), list):
        values["sets"] = tuple(map(str, values["sets"]))
    for name in ("max_tokens", "max_bytes", "seq_len"):
        value = values.get(name)
        if value is not None and (type(value) is not int or value < 1):
            raise UserError(f"{where}.{name} is {value!r}, not a whole number above 0.")
    return cls(**values)


def _check_keys(raw: Any, cls: Any, where: str) -> None:
    if not isinstance(raw, Mapping):
        raise UserError(f"{where}: expected a mapping, got {raw!r}.")
    names = [item.name for item in dataclasses.fields(cls)]
    for key in raw:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, 1)
            hint = f"Did you mean '{near[0]}'?" if near else f"There are {', '.join(names)}."
            raise UserError(f"{where}: unknown field '{key}'. {hint}")
