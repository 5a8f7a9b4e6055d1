"""The log's numbers in a tracker, for those who watch runs there: tensorboard or trackio.

Both are optional and run on this machine; `pip install moekit[track]` brings them.
"""

import importlib
from pathlib import Path
from typing import Any, Protocol

from moekit.core.errors import UserError

from .recipe import Recipe


class Tracker(Protocol):
    """Somewhere that takes numbers by name and step."""

    def log(self, numbers: dict[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class _Tensorboard:
    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self._writer = _module("torch.utils.tensorboard").SummaryWriter(folder / "tensorboard")

    def log(self, numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Trackio:
    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self._trackio = _module("trackio")
        # A resumed run goes on under its name.
        self._trackio.init(
            project="moekit", name=recipe.name, config=recipe.to_dict(), resume="allow"
        )

    def log(self, numbers: dict[str, float], step: int) -> None:
        self._trackio.log(numbers, step=step)

    def close(self) -> None:
        self._trackio.finish()


_KINDS: dict[str, type[Any]] = {"tensorboard": _Tensorboard, "trackio": _Trackio}


def open_trackers(recipe: Recipe, folder: Path) -> list[Tracker]:
    """The trackers that `train.report_to` names; tensorboard's files lie in `folder`.

    Raises UserError for one whose package is not installed.
    """
    return [_KINDS[name](recipe, folder) for name in recipe.train.report_to]


def flat_numbers(entry: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a log entry under names such as routers/imbalance/layer_3."""
    found: dict[str, float] = {}
    for name, value in entry.items():
        if isinstance(value, dict):
            found |= flat_numbers(value, f"{prefix}{name}/")
        elif isinstance(value, list):
            found |= {f"{prefix}{name}/layer_{i}": float(v) for i, v in enumerate(value)}
        elif isinstance(value, (int, float)) and name != "step":
            found[prefix + name] = float(value)
    return found


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.rpartition(".")[2]
        raise UserError(
            f"train.report_to names {package}, which is not installed: pip install moekit[track]"
        ) from error
