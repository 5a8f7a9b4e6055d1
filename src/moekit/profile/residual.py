"""The residual stream at an MoE layer: the input of the norm whose output the experts get."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from moekit.core.layer import MoELayer
from moekit.core.port import SeamCall


class ResidualTap:
    """Watches the norms of every decoder layer; `take(call)` gives the residual stream [T, H].

    None where the experts' input is not what a norm of the layer returned.
    """

    def __init__(self, model: nn.Module, layers: Iterable[MoELayer]):
        self._made: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._handles = [
            norm.register_forward_hook(self._noting(layer.position))
            for layer in layers
            for norm in _norms(model, layer)
        ]

    def close(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()
        self._made.clear()

    def _noting(self, position: int) -> Any:
        def note(module: nn.Module, args: tuple, output: Any) -> None:
            if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                self._made.setdefault(position, []).append((output, args[0]))

        return note

    def take(self, call: SeamCall) -> Tensor | None:
        """The residual stream before the block of this call."""
        made = self._made.pop(call.layer.position, [])
        given = [call.hidden] if call.router_input is None else [call.hidden, call.router_input]
        for tensor in given:
            for output, stream in made:
                # Blocks flatten and view their input but do not copy it.
                same = output.data_ptr() == tensor.data_ptr() and output.numel() == tensor.numel()
                if same and stream.numel() // stream.shape[-1] == len(call.hidden):
                    return stream.reshape(len(call.hidden), -1)
        return None


def decoder_layer(model: nn.Module, layer: MoELayer) -> nn.Module:
    """The module that holds the block, its norms and its residual connection."""
    parts = layer.name.split(".")
    numbered = [i for i, part in enumerate(parts) if part.isdigit()]
    return model.get_submodule(".".join(parts[: numbered[-1] + 1])) if numbered else model


def _norms(model: nn.Module, layer: MoELayer) -> list[nn.Module]:
    inside = set(layer.block.modules())
    return [
        module
        for module in decoder_layer(model, layer).modules()
        if "norm" in type(module).__name__.lower() and module not in inside
    ]
