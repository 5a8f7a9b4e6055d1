"""What the modules of a family were really given, read without moekit, to compare a trace with.

Each check gets the arguments of one call of the module that computes and the routing [T, K] that
moekit reported for it. Shapes: T tokens, E experts, K chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moekit.core.layer import MoELayer
from moekit.core.port import SeamCall


def _seam(layer: MoELayer, args: tuple, call: SeamCall) -> None:
    _, ids, weights = args
    assert torch.equal(call.ids, ids)
    assert torch.equal(call.weights, weights)


def _switch(layer: MoELayer, args: tuple, call: SeamCall) -> None:
    _, dispatch, weights = args
    used = call.ids >= 0
    one_hot = nn.functional.one_hot(call.ids.clamp(min=0), layer.num_experts)
    assert torch.equal(one_hot * used.unsqueeze(-1), dispatch)
    assert torch.equal(call.weights[used], weights[used])
    assert not call.weights[~used].any()


def _nllb(layer: MoELayer, args: tuple, call: SeamCall) -> None:
    # Expert v runs on a token once for every column of the mask that holds the value v.
    _, mask, weights = args
    dense = torch.zeros(len(mask), layer.num_experts, dtype=weights.dtype)
    torch.testing.assert_close(_dense(call, layer), dense.scatter_add(1, mask, weights))


def _llama4(layer: MoELayer, args: tuple, call: SeamCall) -> None:
    scaled = _dense(call, layer).to(call.hidden.dtype).T.unsqueeze(-1) * call.hidden
    assert torch.equal(scaled.flatten(0, 1), args[0])


def _jetmoe(layer: MoELayer, args: tuple, call: SeamCall) -> None:
    # The tokens of expert 0, then those of expert 1, ...
    rows, counts = args
    assert call.ids.flatten().bincount(minlength=layer.num_experts).tolist() == counts
    for e, given in enumerate(rows.split(counts)):
        expected = call.hidden[(call.ids == e).any(dim=-1)]
        assert sorted(expected.tolist()) == sorted(given.tolist())


def _doge(layer: MoELayer, args: tuple, call: SeamCall) -> None:
    assert torch.equal(call.ids, args[0])


def _dense(call: SeamCall, layer: MoELayer) -> Tensor:
    weights = torch.zeros(len(call.ids), layer.num_experts + 1, dtype=call.weights.dtype)
    return weights.scatter(1, call.ids % (layer.num_experts + 1), call.weights)[:, :-1]


# The computing module below the block, and the check of what it got; elsewhere it is the seam.
RECEIVED: dict[str, tuple[str, Callable[[MoELayer, tuple, SeamCall], None]]] = {
    "doge": ("down_embed", _doge),
    "jetmoe": ("input_linear", _jetmoe),
    "llama4": ("experts", _llama4),
    "nllb_moe": ("experts", _nllb),
    "switch_transformers": ("experts", _switch),
}


class Witness:
    """Notes the arguments of every call of the computing modules, in order, by plain hooks."""

    def __init__(self, family: str, layers: list[MoELayer]):
        self.calls: list[tuple[MoELayer, tuple]] = []
        path, self._check = RECEIVED.get(family, ("experts", _seam))
        self._handles = [
            layer.block.get_submodule(path).register_forward_pre_hook(self._note(layer))
            for layer in layers
        ]

    def _note(self, layer: MoELayer) -> Callable[[nn.Module, tuple], None]:
        def hook(module: nn.Module, args: Any) -> None:
            self.calls.append((layer, args))

        return hook

    def stop(self) -> None:
        for handle in self._handles:
            handle.remove()

    def confirm(self, calls: list[SeamCall]) -> None:
        """Check that moekit saw the same calls with the same routing."""
        assert [layer.name for layer, _ in self.calls] == [call.layer.name for call in calls]
        for (layer, args), call in zip(self.calls, calls, strict=True):
            self._check(layer, args, call)
