"""What a converter is given and what it makes; how converters are registered and found.

A converter is a function `(job, *, options...) -> Made`. It reads nothing but configs, headers and
what it must measure: the tensors it makes are `Deferred`, and the writer pulls them through memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PretrainedConfig

from moekit.core.architecture import meta_model
from moekit.core.deferred import Deferred
from moekit.core.errors import UserError
from moekit.core.find import find_moe
from moekit.core.layout import to_model
from moekit.core.method_text import check_options
from moekit.core.registry import Method, register, register_preset, registry
from moekit.core.source_model import SourceModel
from moekit.core.stats import ExpertStats
from moekit.upcycle.start import Start

KIND = "upcycler"


@dataclass(frozen=True)
class Entry:
    """What a recipe says of one model beside the base: texts that its expert is for, and those that
    it is not for; noise on its weights (absolute), a factor on its output; whether it is shared."""

    positive: tuple[str, ...] = ()
    negative: tuple[str, ...] = ()
    noise_scale: float = 0.0
    residual_scale: float = 1.0
    shared: bool = False


@dataclass(frozen=True)
class Job:
    """The models and the data of a conversion; tensors go by the names of the model's parameters.

    `base` is the model that is converted, `others` are those given with --from, `entries` what a
    recipe says of each of those, `stats` what --stats holds, `data` the files of --data.
    In a `dry_run` only the shapes of what is made count: nothing need be trained.
    """

    base: SourceModel
    others: tuple[SourceModel, ...] = ()
    seed: int = 0
    stats: ExpertStats | None = None
    entries: tuple[Entry, ...] = ()
    data: tuple[str, ...] = ()
    dry_run: bool = False

    def entry(self, number: int) -> Entry:
        """What is said of `others[number]`."""
        return self.entries[number] if self.entries else Entry()

    def is_mixture(self) -> bool:
        """Whether the base has MoE layers."""
        return bool(find_moe(meta_model(self.base.config)))

    def need_dense(self) -> None:
        """Raise `UserError` unless every model is dense."""
        for model in (self.base, *self.others):
            if find_moe(meta_model(model.config)):
                raise UserError(
                    f"{model.name} is a MoE ({model.config.model_type}); this method starts from "
                    "dense models. `expert-upcycling` makes a larger MoE of a MoE."
                )

    def need_mixture(self) -> None:
        """Raise `UserError` unless the base has MoE layers."""
        if not self.is_mixture():
            raise UserError(
                f"{self.base.name} is dense ({self.base.config.model_type}); this method starts "
                "from a MoE."
            )

    def need_alone(self) -> None:
        """Raise `UserError` where models were given beside the base."""
        if self.others:
            raise UserError(
                f"this method converts one model; --from {self.others[0].name} is for the methods "
                "that join several."
            )


@dataclass
class Made:
    """The model that a converter makes: its config, its tensors by parameter name, step 0.

    `notes` is what the user should know, `numbers` what was measured on the way, `files` further
    files to write beside the weights.
    """

    config: PretrainedConfig
    tensors: dict[str, Deferred]
    start: Start
    notes: list[str] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str | bytes] = field(default_factory=dict)


Converter = Callable[..., Made]
upcycler = functools.partial(register, KIND)


def preset(
    kernel: Converter,
    name: str,
    *,
    settings: Mapping[str, Any],
    defaults: Mapping[str, Any] | None = None,
    **fields: Any,
) -> Method:
    """Register a setting of a kernel that is registered itself.

    `settings` are options that it fixes, `defaults` those it has other defaults for; the rest keep
    the kernel's help and defaults. `fields` are those of `Method`.
    """
    target = f"{kernel.__module__}:{kernel.__qualname__}"
    whole = next(m for m in registry.methods(kind=KIND) if m.target == target and not m.settings)
    own = dict(defaults or {})
    known = {option.name for option in whole.options}
    if unknown := {*settings, *own} - known:
        raise ValueError(f"{name}: {sorted(unknown)} are no options of {kernel.__qualname__}")
    left = tuple(
        replace(option, default=own.get(option.name, option.default))
        for option in whole.options
        if option.name not in settings
    )
    given = {**settings, **own}
    return register_preset(kernel, name, kind=KIND, options=left, settings=given, **fields)


def find_converter(name: str, options: Mapping[str, Any]) -> Converter:
    """The converter of that name with its options bound; `UserError` for what there is not."""
    method = registry.find(name, kind=KIND)
    check_options(method, options, f"--method {name}")
    missing = [o.name for o in method.options if o.required and o.name not in options]
    if missing:
        raise UserError(f"--method {name} needs {', '.join(missing)}: {name}:{missing[0]}=VALUE")
    return functools.partial(method.load(), **options)


def by_parameter(source: SourceModel) -> SourceModel:
    """The model with its tensors under the names of its parameters; raises as `to_model`."""
    return replace(source, tensors=to_model(source.tensors, meta_model(source.config)).tensors)
