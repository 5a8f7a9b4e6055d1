"""The large values of an `ExpertPlan`: neuron orders, router maps, replaced tensors.

They lie in a safetensors file beside the plan's JSON, which names it by its hash.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moekit.core.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

_NEURONS = re.compile(r"neurons\.(\d+)\.(\d+)")
_ROUTER = re.compile(r"router\.(\d+)")
_VALUE = "value."
_FIT = "fit."


@dataclass(frozen=True, eq=False)
class PlanTensors:
    """Values by layer (decoder layer) and expert (original id).

    `neurons` maps (layer, expert) to int64 [n]: the neurons of the expert that stay, in this order;
    without it all F stay in their own. `router_maps` maps a layer to [r, E]: row i mixes the router
    rows of the E original experts into that of resulting expert i. `values` maps names of
    parameters of the resulting model to their new values. `fit` is what the method of the plan's
    `fit` needs beside its options, by names of its own.
    """

    neurons: Mapping[tuple[int, int], Tensor] = field(default_factory=dict)
    router_maps: Mapping[int, Tensor] = field(default_factory=dict)
    values: Mapping[str, Tensor] = field(default_factory=dict)
    fit: Mapping[str, Tensor] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.neurons or self.router_maps or self.values or self.fit)

    def named(self) -> dict[str, Tensor]:
        """Every tensor by its name in the file."""
        return {
            **{f"neurons.{layer}.{e}": t for (layer, e), t in sorted(self.neurons.items())},
            **{f"router.{layer}": t for layer, t in sorted(self.router_maps.items())},
            **{f"{_VALUE}{name}": t for name, t in sorted(self.values.items())},
            **{f"{_FIT}{name}": t for name, t in sorted(self.fit.items())},
        }

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PlanTensors):
            return NotImplemented
        return self.to_bytes() == other.to_bytes()

    __hash__ = None  # type: ignore[assignment]

    def to_bytes(self) -> bytes:
        """The file; nothing at all where there are no values."""
        if not self:
            return b""
        from safetensors.torch import save

        # Cloned: plans share a tensor between layers, which the format does not.
        return save({name: tensor.clone() for name, tensor in self.named().items()})

    def sha256(self) -> str:
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @classmethod
    def from_bytes(cls, data: bytes, source: str) -> PlanTensors:
        """Read what `to_bytes` wrote; `source` names the file in errors (`UserError`)."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            tensors = load(data)
        except SafetensorError as error:
            raise UserError(f"{source} is no safetensors file: {error}.") from None
        neurons: dict[tuple[int, int], Any] = {}
        router_maps: dict[int, Any] = {}
        values, fit = {}, {}
        for name, tensor in tensors.items():
            if match := _NEURONS.fullmatch(name):
                neurons[int(match[1]), int(match[2])] = tensor
            elif match := _ROUTER.fullmatch(name):
                router_maps[int(match[1])] = tensor
            elif name.startswith(_VALUE):
                values[name.removeprefix(_VALUE)] = tensor
            elif name.startswith(_FIT):
                fit[name.removeprefix(_FIT)] = tensor
            else:
                raise UserError(f"{source} holds {name!r}, which is no value of a plan.")
        return cls(neurons, router_maps, values, fit)
