"""A recipe of experts and prompts: mergekit-moe's YAML, with any other method in its place."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from moekit.core.convert import DTYPES
from moekit.core.errors import UserError
from moekit.upcycle.converter import Entry
from moekit.upcycle.run import Request

FIELDS = (
    "base_model",
    "experts",
    "shared_experts",
    "gate_mode",
    "dtype",
    "experts_per_token",
    "architecture",
    "method",
    "options",
)
EXPERT_FIELDS = (
    "source_model",
    "positive_prompts",
    "negative_prompts",
    "noise_scale",
    "residual_scale",
)
# `hidden` of mergekit takes the last position, as `hidden_last` does.
GATE_MODES = {
    "hidden": "hidden-last",
    "hidden_last": "hidden-last",
    "hidden_avg": "hidden-mean",
    "cheap_embed": "embedding",
    "random": "random",
    "uniform_random": "uniform",
}
ARCHITECTURES = {"mixtral": "mixtral", "qwen": "qwen2_moe", "qwen3": "qwen3_moe"}
METHOD = "mergekit-moe"


def load_moe_recipe(path: Path, *, to: str, dtype: str | None = None) -> Request:
    """The request of YAML file `path`; `to` and `dtype`, where given, are as in `Request`.

    Beside mergekit's fields, `method` names another converter that joins models and `options` its
    options. Raises `UserError` naming the field for what is unknown, missing or of the wrong type.
    """
    import yaml

    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"recipe {path} is not valid YAML: {error}") from None
    _check_fields(raw, FIELDS, f"recipe {path}")
    for name in ("base_model", "experts"):
        if not raw.get(name):
            raise UserError(f"recipe {path} lacks {name}.")
    experts = _experts(raw["experts"], "experts") + [
        (model, replace(entry, shared=True))
        for model, entry in _experts(raw.get("shared_experts"), "shared")
    ]
    number_format = dtype or raw.get("dtype")
    if number_format is not None and number_format not in DTYPES:
        raise UserError(f"dtype {number_format!r} is unknown; there are {', '.join(DTYPES)}.")
    return Request(
        str(raw.get("method", METHOD)),
        str(raw["base_model"]),
        tuple(model for model, _ in experts),
        _options(raw),
        tuple(entry for _, entry in experts),
        number_format,
        to,
    )


def _options(raw: Mapping[str, Any]) -> dict[str, Any]:
    options = raw.get("options") or {}
    if not isinstance(options, Mapping):
        raise UserError(f"options is {options!r}, not a mapping.")
    found: dict[str, Any] = {str(key): value for key, value in options.items()}
    if "gate_mode" in raw:
        found["router"] = _choice("gate_mode", raw["gate_mode"], GATE_MODES)
    if "experts_per_token" in raw:
        found["top_k"] = _number("experts_per_token", raw["experts_per_token"], int)
    if "architecture" in raw:
        if raw["architecture"] == "deepseek":
            raise UserError(
                "architecture deepseek: transformers has no class of it; glm4_moe has its shared "
                "and fine experts (options: {target: glm4_moe})."
            )
        found["target"] = _choice("architecture", raw["architecture"], ARCHITECTURES)
    return found


def _experts(raw: Any, where: str) -> list[tuple[str, Entry]]:
    if raw is None:
        return []
    if not isinstance(raw, list):
        raise UserError(f"{where} is {raw!r}, not a list.")
    found = []
    for number, one in enumerate(raw):
        place = f"{where}[{number}]"
        _check_fields(one, EXPERT_FIELDS, place)
        if not one.get("source_model"):
            raise UserError(f"{place} lacks source_model.")
        scales = {
            key: _number(f"{place}.{key}", one[key], float)
            for key in ("noise_scale", "residual_scale")
            if one.get(key) is not None
        }
        entry = Entry(
            _texts(one.get("positive_prompts"), f"{place}.positive_prompts"),
            _texts(one.get("negative_prompts"), f"{place}.negative_prompts"),
            **scales,
        )
        found.append((str(one["source_model"]), entry))
    return found


def _texts(raw: Any, where: str) -> tuple[str, ...]:
    if raw is None:
        return ()
    if not isinstance(raw, list) or not all(isinstance(text, str) and text for text in raw):
        raise UserError(f"{where} is {raw!r}, not a list of texts.")
    return tuple(raw)


def _number(where: str, value: Any, kind: type) -> Any:
    right = isinstance(value, int | float) if kind is float else type(value) is int
    if isinstance(value, bool) or not right:
        raise UserError(f"{where} is {value!r}, not a number.")
    return kind(value)


def _choice(where: str, value: Any, known: Mapping[str, str]) -> str:
    if value not in known:
        near = difflib.get_close_matches(str(value), known, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        raise UserError(f"{where} {value!r} is unknown: {hint}")
    return known[value]


def _check_fields(raw: Any, known: tuple[str, ...], where: str) -> None:
    if not isinstance(raw, Mapping):
        raise UserError(f"{where} is {raw!r}, not a mapping.")
    for key in raw:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise UserError(f"{where} has no field {key!r}: {hint}")
