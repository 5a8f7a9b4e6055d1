"""The registry of methods: what exists, what it needs, where its code is.

A method says so itself, with the `register` decorator, in the module that holds it. Reading every
module to answer `moekit list` would import torch, so the descriptions are also kept in
`_index.json` beside this file, written by `python -m moekit.core.registry`; a test fails when it
is stale. Another package joins by naming a module of its own in the entry-point group
`moekit.methods`; importing that module must register its methods.
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
import importlib
import importlib.metadata
import inspect
import json
import pkgutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from moekit.core.errors import UserError

ENTRY_POINT_GROUP = "moekit.methods"
INDEX_PATH = Path(__file__).with_name("_index.json")
INDEX_FORMAT = 1

KINDS = (
    "router",
    "balance",
    "expert",
    "attention",
    "backend",
    "saliency",
    "search",
    "skipping",
    "sparsifier",
    "grouping",
    "fuser",
    "condenser",
    "slimmer",
    "quantizer",
    "factorizer",
    "codec",
    "policy",
    "predictor",
    "scheduler",
    "merge",
    "converter",
    "upcycler",
    "measure",
)
NEEDS = ("weights", "data", "gradients", "trace", "training")

T = TypeVar("T", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Option:
    """A keyword-only parameter of a method; `default` is None as well where `required`."""

    name: str
    type: str
    help: str
    default: Any = None
    required: bool = False


@dataclass(frozen=True, slots=True)
class Method:
    """What the registry knows of one method without importing it.

    `lossless` is None where the question does not arise (it is asked of runtime features).
    `settings` are fixed keyword arguments of `target`: not empty for a preset of a kernel.
    """

    name: str
    kind: str
    title: str
    target: str  # "package.module:qualified.name"
    paper: str = ""
    needs: tuple[str, ...] = ()
    lossless: bool | None = None
    limits: str = ""
    options: tuple[Option, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"method {self.name!r}: kind {self.kind!r} is not one of {KINDS}")
        unknown = set(self.needs) - set(NEEDS)
        if unknown:
            raise ValueError(f"method {self.name!r}: needs {sorted(unknown)} not among {NEEDS}")

    def load(self) -> Callable[..., Any]:
        """Import and return the code, with a preset's settings bound."""
        module, _, qualname = self.target.partition(":")
        code: Any = importlib.import_module(module)
        for part in qualname.split("."):
            code = getattr(code, part)
        return functools.partial(code, **self.settings) if self.settings else code

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Method:
        options = tuple(Option(**option) for option in data["options"])
        return cls(**{**data, "needs": tuple(data["needs"]), "options": options})


class Registry:
    """Methods by (kind, name): those of the index, of imported modules, and of other packages."""

    def __init__(self, index_path: Path | None = None) -> None:
        self._index_path = index_path
        self._registered: dict[tuple[str, str], Method] = {}
        self._indexed: dict[tuple[str, str], Method] | None = None

    def register(
        self,
        kind: str,
        name: str,
        *,
        title: str,
        paper: str = "",
        needs: tuple[str, ...] = (),
        lossless: bool | None = None,
        limits: str = "",
        options: Mapping[str, str] | None = None,
    ) -> Callable[[T], T]:
        """Decorator that registers a function or class; `options` maps parameters to their help.

        Types and defaults of the options are read from the signature, where each must be a
        keyword-only parameter. Raises ValueError for an unknown kind, need or option, and for a
        (kind, name) that other code has already taken.
        """

        def decorate(code: T) -> T:
            method = Method(
                name=name,
                kind=kind,
                title=title,
                target=f"{code.__module__}:{code.__qualname__}",
                paper=paper,
                needs=needs,
                lossless=lossless,
                limits=limits,
                options=_options_of(code, options or {}),
            )
            self._add(method)
            return code

        return decorate

    def register_preset(self, kernel: Callable[..., Any], name: str, **fields: Any) -> Method:
        """Register `kernel` once more under `name`, with its `settings` fixed.

        `fields` are those of Method: `kind`, `title` and `settings` at least.
        """
        target = f"{kernel.__module__}:{kernel.__qualname__}"
        method = Method(name=name, target=target, **fields)
        self._add(method)
        return method

    def methods(
        self, *, kind: str | None = None, needs: str | None = None, pattern: str = "*"
    ) -> list[Method]:
        """Methods sorted by kind and name; `needs` keeps those that need it, "none" the others'.

        `pattern` is a shell pattern on the name. Raises UserError for an unknown kind or need.
        """
        _check_choice("kind", kind, KINDS)
        _check_choice("need", needs, (*NEEDS, "none"))
        found = self._all().values()
        return sorted(
            (
                method
                for method in found
                if (kind is None or method.kind == kind)
                and (needs is None or needs in (method.needs or ("none",)))
                and fnmatch.fnmatchcase(method.name, pattern)
            ),
            key=lambda method: (KINDS.index(method.kind), method.name),
        )

    def find(self, name: str, *, kind: str | None = None) -> Method:
        """The one method of that name; UserError with the nearest names if there is none."""
        methods = self.methods(kind=kind)
        found = [method for method in methods if method.name == name]
        if len(found) == 1:
            return found[0]
        if found:
            kinds = ", ".join(method.kind for method in found)
            raise UserError(
                f"{name!r} is the name of {len(found)} methods: say which kind: {kinds}"
            )
        of_kind = f"{kind} " if kind else ""
        near = difflib.get_close_matches(name, [method.name for method in methods])
        hint = f"did you mean {' or '.join(near)}?" if near else "`moekit list` shows all"
        raise UserError(f"no {of_kind}method is named {name!r}: {hint}")

    def write_index(self, path: Path | None = None) -> Path:
        """Import every module of moekit and write what they registered."""
        path = path or self._index_path
        if path is None:
            raise ValueError("this registry has no index")
        path.write_text(self.index_text(), encoding="utf-8")
        return path

    def index_text(self) -> str:
        """The index as it should be, from the code itself."""
        package = importlib.import_module("moekit")
        for module in pkgutil.walk_packages(package.__path__, "moekit."):
            if not module.name.endswith(".__main__"):
                importlib.import_module(module.name)
        own = [m for m in self._registered.values() if m.target.startswith("moekit.")]
        own.sort(key=lambda method: (KINDS.index(method.kind), method.name))
        index = {"format": INDEX_FORMAT, "methods": [method.to_dict() for method in own]}
        return json.dumps(index, indent=1, ensure_ascii=False) + "\n"

    def _add(self, method: Method) -> None:
        key = (method.kind, method.name)
        other = self._registered.get(key)
        if other is not None and other.target != method.target:
            raise ValueError(
                f"{method.kind} {method.name!r} is registered by {other.target} already, "
                f"not by {method.target}"
            )
        self._registered[key] = method

    def _all(self) -> dict[tuple[str, str], Method]:
        if self._indexed is None:
            self._indexed = _read_index(self._index_path) if self._index_path else {}
            _import_entry_points()
        return {**self._indexed, **self._registered}


def _read_index(path: Path) -> dict[tuple[str, str], Method]:
    data = json.loads(path.read_text(encoding="utf-8"))
    methods = [Method.from_dict(row) for row in data["methods"]]
    return {(method.kind, method.name): method for method in methods}


def _import_entry_points() -> None:
    for entry_point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        try:
            entry_point.load()
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            # One broken package must not hide everybody else's methods.
            warnings.warn(
                f"methods of {entry_point.value!r} cannot be loaded: {error}", stacklevel=2
            )


def _check_choice(what: str, value: str | None, choices: tuple[str, ...]) -> None:
    if value is not None and value not in choices:
        near = difflib.get_close_matches(value, choices, n=1)
        hint = f"did you mean {near[0]}?" if near else f"it is one of {', '.join(choices)}"
        raise UserError(f"unknown {what} {value!r}: {hint}")


def _options_of(code: Callable[..., Any], helps: Mapping[str, str]) -> tuple[Option, ...]:
    parameters = inspect.signature(code).parameters if helps else {}
    options = []
    for name, text in helps.items():
        parameter = parameters.get(name)
        if parameter is None or parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            raise ValueError(
                f"{code.__qualname__}: option {name!r} is not a keyword-only parameter"
            )
        required = parameter.default is inspect.Parameter.empty
        annotation = parameter.annotation
        options.append(
            Option(
                name=name,
                type=annotation if isinstance(annotation, str) else annotation.__name__,
                help=text,
                default=None if required else parameter.default,
                required=required,
            )
        )
    return tuple(options)


registry = Registry(INDEX_PATH)
register = registry.register
register_preset = registry.register_preset


if __name__ == "__main__":
    # Run as a script this file is a second module, with a registry of its own: use the real one.
    print(importlib.import_module("moekit.core.registry").registry.write_index())
