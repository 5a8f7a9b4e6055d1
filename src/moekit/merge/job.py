"""What a merge method is given for one tensor, and what a method says of itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moekit.core.errors import UserError
from moekit.merge.task_vectors import Settings, read_rows

if TYPE_CHECKING:
    from moekit.merge.preparation import Preparation

REQUIRED = object()
Rows = Iterator[tuple[int, Tensor]]
Prepare = Callable[["Mapping[str, TensorJob]", "Preparation"], "Mapping[str, TensorJob]"]
# Elements of a block: small enough that a few of them stay in the caches of one core.
BLOCK_ELEMENTS = 2**18


@dataclass(frozen=True)
class TensorJob:
    """One tensor of the result: the same tensor of every model, and the values of the parameters.

    `tensors` and `base` (None where the recipe has none) are read by rows. `per_model` has a value
    for each of `tensors`. `dtype` is that of the arithmetic. `generator(i)` gives a fresh random
    generator for model i, fixed by seed, model and tensor. `origins` are the (model, name) of each
    of `tensors`, `base_origin` that of the base. `statistics` has for each of `tensors` what was
    measured for it, or None.
    """

    name: str
    base: Any
    tensors: Sequence[Any]
    per_model: Mapping[str, list[Any]]
    options: Mapping[str, Any]
    dtype: torch.dtype
    generator: Callable[[int], torch.Generator]
    origins: tuple[tuple[str, str], ...] = ()
    base_origin: tuple[str, str] | None = None
    statistics: Sequence[Any] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensors[0].shape if self.base is None else self.base.shape)

    @property
    def block_rows(self) -> int:
        """Rows of a block."""
        row = max(1, int(torch.Size(self.shape[1:]).numel()))
        return max(1, BLOCK_ELEMENTS // row)

    def spans(self) -> Iterator[tuple[int, int]]:
        """(first row, behind the last) of every block; a scalar is one row."""
        rows = self.shape[0] if self.shape else 1
        for start in range(0, rows, self.block_rows):
            yield start, min(start + self.block_rows, rows)

    def rows(self, tensor: Any, start: int, stop: int) -> Tensor:
        """Rows of one of the tensors, in the dtype of the arithmetic."""
        return read_rows(tensor, start, stop).to(self.dtype)

    def whole(self, tensor: Any) -> Tensor:
        """One of the tensors, all of it, in the dtype of the arithmetic."""
        return (tensor.read() if hasattr(tensor, "read") else tensor).to(self.dtype)

    def cast(self, tensor: Any) -> Any:
        """One of the tensors, read in the dtype of the arithmetic."""
        return tensor if tensor.dtype == self.dtype else _Cast(tensor, self.dtype)

    def all_whole(self) -> list[Tensor]:
        return [self.whole(tensor) for tensor in self.tensors]

    def deltas(self) -> Tensor:
        """The task vectors [N, ...], whole."""
        base = self.whole(self.base)
        return torch.stack([tensor - base for tensor in self.all_whole()])

    def of_expert(self, expert: int) -> TensorJob:
        """The same for one entry of the first axis, with random draws of its own."""

        def drawn(model: int) -> torch.Generator:
            source = self.generator(model)
            return source.manual_seed((source.initial_seed() + expert) % 2**63)

        return replace(
            self,
            base=None if self.base is None else self.base[expert],
            tensors=[tensor[expert] for tensor in self.tensors],
            statistics=[None if one is None else one[expert] for one in self.statistics],
            generator=drawn,
        )


class _Cast:
    """A tensor that is read in another dtype."""

    def __init__(self, tensor: Any, dtype: torch.dtype) -> None:
        self._tensor, self.dtype = tensor, dtype
        self.shape, self.ndim = tensor.shape, tensor.ndim

    def numel(self) -> int:
        return int(self._tensor.numel())

    def read(self) -> Tensor:
        tensor = self._tensor
        return (tensor.read() if hasattr(tensor, "read") else tensor).to(self.dtype)

    def rows(self, start: int, stop: int) -> Tensor:
        return read_rows(self._tensor, start, stop).to(self.dtype)


@dataclass(frozen=True)
class MergeMethod:
    """A merge method: its code, its parameters with defaults, and how many models it takes.

    `base` is needed, optional, first (one of the models, which comes first) or none.
    `per_model` and `options` map parameters to defaults; `REQUIRED` has none. `settings` are those
    of a method of the task-vector kernel. `prepare` is called once with all tensors of the method
    before any is merged, and gives them with what it found out; `data` says that it reads text.
    """

    name: str
    run: Callable[[TensorJob], Rows]
    base: str = "none"
    per_model: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    models: tuple[int, int | None] = (1, None)
    settings: Settings | None = None
    prepare: Prepare | None = None
    data: bool = False

    def check(self, count: int, has_base: bool) -> None:
        """Raise `UserError` unless it merges `count` models beside a base, or without one."""
        least, most = self.models
        if self.base in ("needed", "first") and not has_base:
            raise UserError(f"{self.name} needs a base_model.")
        if count < least or (most is not None and count > most):
            wanted = f"{least}" if least == most else f"at least {least}"
            if most is not None and least != most:
                wanted = f"{least} to {most}"
            raise UserError(f"{self.name} merges {wanted} models beside the base, not {count}.")


@dataclass(frozen=True)
class ByTensor:
    """A method that needs whole tensors, as one that gives rows."""

    merge: Callable[[TensorJob], Tensor]

    def __call__(self, job: TensorJob) -> Rows:
        yield 0, self.merge(job).reshape(job.shape)
