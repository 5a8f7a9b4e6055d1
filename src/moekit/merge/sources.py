"""The models that are merged: their tensors under common names, and the numbers of layers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from moekit.core.architecture import meta_model
from moekit.core.deferred import Deferred
from moekit.core.errors import UserError
from moekit.core.find import find_moe
from moekit.core.layout import PER_EXPERT, ModelTensors, to_model
from moekit.core.source_model import SourceModel, open_source

LAYER = re.compile(
    r"^(?P<before>(?:.*?\.)?(?:layers|h|blocks|block)\.)(?P<index>\d+)(?P<after>\..+)$"
)


class MergeSources:
    """Context manager that opens the models of a merge.

    Where all hold the same names they keep them; where one is stored in another layout, or expert
    by expert, all go by the names of the model's parameters: what a method makes of a tensor must
    not depend on how it was stored. `by_parameter` has them always go by those. Raises
    `UserError` for models of different families.
    """

    def __init__(
        self, names: Iterable[str], find: Callable[[str], Path], *, by_parameter: bool = False
    ) -> None:
        self._names = list(dict.fromkeys(names))
        self._by_parameter = by_parameter
        self._find = find
        self._stack = ExitStack()
        self.by_name: dict[str, SourceModel] = {}

    def __enter__(self) -> MergeSources:
        try:
            for name in self._names:
                self.by_name[name] = open_source(name, self._find(name), self._stack)
            self._check_families()
            found = [set(source.tensors) for source in self.by_name.values()]
            mapped = {name: _mapped(source) for name, source in self.by_name.items()}
            by_expert = any(tensors.layout == PER_EXPERT for tensors in mapped.values())
            if self._by_parameter or by_expert or any(names != found[0] for names in found):
                self.by_name = {
                    name: replace(source, tensors=mapped[name].tensors)
                    for name, source in self.by_name.items()
                }
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def __getitem__(self, name: str) -> SourceModel:
        return self.by_name[name]

    def _check_families(self) -> None:
        first, *others = self.by_name.values()
        for other in others:
            if other.config.model_type != first.config.model_type:
                raise UserError(
                    f"{first.name} is a {first.config.model_type} and {other.name} a "
                    f"{other.config.model_type}; models of one family can be merged."
                )


def _mapped(source: SourceModel) -> ModelTensors:
    return to_model(source.tensors, meta_model(source.config))


def expert_banks(source: SourceModel) -> set[str]:
    """The names of the tensors whose first axis are experts; `UserError` where there is none."""
    found = {
        f"{site.experts_path}.{name}"
        for site in find_moe(meta_model(source.config))
        for name, _ in site.experts.named_parameters()
        if f"{site.experts_path}.{name}" in source.tensors
    }
    if not found:
        raise UserError(f"scope: expert, but {source.name} has no banks of experts.")
    return found


def layer_of_name(name: str) -> tuple[str, int, str] | None:
    """(before, number, after) of a tensor in a decoder layer; None for one outside of them."""
    match = LAYER.match(name)
    return None if match is None else (match["before"], int(match["index"]), match["after"])


def common_shape(name: str, tensors: Mapping[str, Deferred]) -> tuple[int, ...]:
    """The shape that a tensor has in all models; `UserError` with the shapes where they differ."""
    shapes = {model: tuple(tensor.shape) for model, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        told = ", ".join(f"{list(shape)} in {model}" for model, shape in shapes.items())
        raise UserError(
            f"{name} has different shapes: {told}. Only models of one shape can be merged; for "
            "vocabularies of different sizes say tokenizer_source."
        )
    return next(iter(shapes.values()))
