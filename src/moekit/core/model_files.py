"""The files of a model besides its weights: which are copied, and how `config.json` changes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from moekit.core.architecture import read_config
from moekit.core.checkpoint import INDEX_FILE
from moekit.core.errors import UserError
from moekit.core.load import PACKED_FILE
from moekit.core.record import RECORD_FILE

# Everything else in a model's directory is left out: pickles can run code, other weight formats
# would not match the new weights.
COPIED_SUFFIXES = {".json", ".jinja", ".txt", ".model", ".md", ".tiktoken", ".vocab", ".yaml"}
COPIED_NAMES = {"LICENSE", "LICENCE", "NOTICE"}
COPIED_DIRECTORIES = ("additional_chat_templates",)
CODE_SUFFIX = ".py"
WRITTEN_ANEW = {"config.json", INDEX_FILE, RECORD_FILE, PACKED_FILE}


def side_files(directory: Path, code: bool = False) -> tuple[dict[str, Path], list[str]]:
    """Files to copy (name in the output -> path), and the names of files left out apart from
    safetensors. Python files are copied only if `code`."""
    copied: dict[str, Path] = {}
    left_out = []
    for path in sorted(directory.iterdir()):
        if path.is_dir():
            if path.name in COPIED_DIRECTORIES:
                inside = sorted(p for p in path.iterdir() if p.suffix == ".jinja")
                copied |= {f"{path.name}/{p.name}": p for p in inside}
            continue
        wanted = path.suffix in COPIED_SUFFIXES or path.name in COPIED_NAMES
        if path.name in WRITTEN_ANEW or path.suffix == ".safetensors":
            continue
        # The index of a pickled or foreign checkpoint names files that are not copied.
        if path.name.endswith(".index.json"):
            wanted = False
        if wanted or (code and path.suffix == CODE_SUFFIX):
            copied[path.name] = path
        else:
            left_out.append(path.name)
    return copied, left_out


def edited_config(
    raw: Mapping[str, Any],
    before: PretrainedConfig,
    after: PretrainedConfig,
    dtype: str | None,
) -> dict[str, Any]:
    """`config.json` for the new weights: `raw` with what changed from `before` to `after`, the new
    dtype, and without the quantisation that the weights no longer have.

    Raises `UserError` where the edited file would not read back as `after`.
    """
    edited = copy.deepcopy(dict(raw))
    _patch(edited, _difference(before.to_dict(), after.to_dict()), after)
    for part in (edited, edited.get("text_config")):
        if isinstance(part, dict):
            part.pop("quantization_config", None)
    if dtype is not None:
        _set_dtype(edited, dtype)
    wanted = _difference(before.to_dict(), after.to_dict())
    actual = _difference(before.to_dict(), read_config(edited).to_dict())
    for key, value in wanted.items():
        if actual.get(key) != value:
            raise UserError(f"config.json cannot be changed to {key} = {value!r}; nothing written.")
    return edited


def _difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """What `after` has and `before` has not, nested as they are."""
    changes: dict[str, Any] = {}
    for key, value in after.items():
        old = before.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            if nested := _difference(old, value):
                changes[key] = nested
        elif value != old:
            changes[key] = value
    return changes


def _patch(edited: dict[str, Any], changes: Mapping[str, Any], config: PretrainedConfig) -> None:
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(edited.get(key), dict):
            _patch(edited[key], value, getattr(config, key, config))
            continue
        # The file may use another name for the same field; both must not contradict.
        for alias, name in config.attribute_map.items():
            if name == key and alias in edited:
                edited[alias] = value
        edited[key] = value


def _set_dtype(edited: dict[str, Any], dtype: str) -> None:
    edited.pop("torch_dtype", None)
    edited["dtype"] = dtype
    for part in edited.values():
        if isinstance(part, dict) and {"dtype", "torch_dtype"} & set(part):
            _set_dtype(part, dtype)
