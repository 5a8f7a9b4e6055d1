"""Statistics of what every matrix of a model reads, by the name of the parameter.

Second moments for regression means, mean absolute values for activation-informed merging. Shapes:
T tokens, D inputs of a matrix, E experts of a bank.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moekit.core.collect import Batch, by_length
from moekit.core.find import find_moe
from moekit.core.view import MoEView
from moekit.profile.pass_ import profile

# Second moments held at a time; more layers take more passes.
LIMIT_BYTES = 2 << 30
KINDS = ("second", "absolute")


@dataclass
class ParameterInputs:
    """Means over tokens by parameter name, and the axis of the parameter that reads the input.

    "second": x x^T, [D, D] of a matrix and [E, D, D] of a bank; "absolute": |x|, [D] and [E, D]. An
    expert that no token reached has zeros. `axis` counts from the end: -1, or -2 where a family
    stores matrices transposed.
    """

    kind: str
    values: dict[str, Tensor] = field(default_factory=dict)
    axis: dict[str, int] = field(default_factory=dict)


def parameter_inputs(
    model: nn.Module, sequences: Sequence[Tensor], kind: str, limit_bytes: int = LIMIT_BYTES
) -> ParameterInputs:
    """The inputs of every `nn.Linear` and expert bank over unpadded `sequences` [1, S] of ids.

    Matrices that read the same tensor share their statistic. Families whose routers or experts
    are neither are left out, and so are embeddings: nothing is multiplied there.
    """
    found = ParameterInputs(kind)
    batches = list(by_length(sequences))
    linears = [(name, m) for name, m in model.named_modules() if type(m) is nn.Linear]
    for group in _groups(linears, kind, limit_bytes):
        sums = _LinearSums(kind)
        with sums.attached(group), torch.no_grad():
            for ids in batches:
                model(input_ids=ids, use_cache=False)
        for name, _ in group:
            value = sums.mean(name)
            if value is not None:
                found.values[f"{name}.weight"], found.axis[f"{name}.weight"] = value, -1
    if find_moe(model):
        _add_experts(model, batches, found)
    return found


def _groups(
    linears: list[tuple[str, nn.Linear]], kind: str, limit: int
) -> Iterator[list[tuple[str, nn.Linear]]]:
    group: list[tuple[str, nn.Linear]] = []
    used = 0
    for name, module in linears:
        size = 4 * module.in_features ** (2 if kind == "second" else 1)
        if group and used + size > limit:
            yield group
            group, used = [], 0
        group.append((name, module))
        used += size
    if group:
        yield group


class _LinearSums:
    """Sums over the inputs of some linear layers."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._sums: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}
        self._leader: dict[str, str] = {}
        self._last: tuple[str, Tensor] | None = None

    @contextmanager
    def attached(self, linears: Sequence[tuple[str, nn.Linear]]) -> Iterator[None]:
        handles = [m.register_forward_pre_hook(self._hook(name)) for name, m in linears]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._last = None

    def _hook(self, name: str) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Any, ...]) -> None:
            if self._last is not None and self._last[1] is args[0]:
                # Queries, keys and values read one tensor, and so do gate and up.
                self._leader[name] = self._last[0]
                return
            self._last = name, args[0]
            values = args[0].detach().reshape(-1, args[0].shape[-1]).float()
            self._tokens[name] = self._tokens.get(name, 0) + len(values)
            if name not in self._sums:
                width = values.shape[1]
                shape = (width, width) if self._kind == "second" else (width,)
                self._sums[name] = torch.zeros(shape)
            if self._kind == "second":
                self._sums[name].addmm_(values.T, values)
            else:
                self._sums[name] += values.abs().sum(0)

        return see

    def mean(self, name: str) -> Tensor | None:
        leader = self._leader.get(name, name)
        if leader not in self._sums:
            return None
        return self._sums[leader] / self._tokens[leader]


def _add_experts(model: nn.Module, batches: Sequence[Tensor], found: ParameterInputs) -> None:
    view = MoEView(model)
    full = found.kind == "second"
    names = ("input_second", "middle_second") if full else ("input_abs", "middle_abs")
    with tempfile.TemporaryDirectory() as scratch:
        stats = profile(
            view,
            [Batch(ids) for ids in batches],
            sets=["full" if full else "diagonal"],
            scratch=Path(scratch),
        )
        for site, layer in zip(find_moe(model), view.layers, strict=True):
            axis = -2 if getattr(layer.experts, "is_transposed", False) else -1
            tokens = stats.get(layer.position, "moment_tokens").clamp(min=1)
            reading = "gate_up_proj" if hasattr(layer.experts, "gate_up_proj") else "up_proj"
            for name, parameter in zip(names, (reading, "down_proj"), strict=True):
                total = stats.get(layer.position, name).float()
                key = f"{site.experts_path}.{parameter}"
                found.values[key] = total / tokens.view(-1, *[1] * (total.ndim - 1))
                found.axis[key] = axis
