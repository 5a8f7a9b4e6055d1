"""Routers, as something that can be asked about the input of an earlier layer.

Shapes: T tokens, D width, E experts, K chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from moekit.core.errors import UserError
from moekit.core.layer import MoELayer
from moekit.core.view import MoEView

# Names that families give to the norm before the experts, beside the MoE block.
NORM_NAMES = (
    "pre_feedforward_layernorm",
    "pre_mlp_layernorm",
    "post_attention_layernorm",
    "ffn_norm",
    "norm2",
)
PROBES = 16


@dataclass(frozen=True)
class Gate:
    """The router of one layer: `values` maps its input [T, D] to values [T, E] in float32, of
    which it chooses the `top_k` highest.

    `gain` and `offset` [D] are those of the norm before the router; None where it is not known.
    """

    values: Callable[[Tensor], Tensor]
    top_k: int
    gain: Tensor | None = None
    offset: Tensor | None = None

    def renorm(self, earlier: Gate) -> tuple[Tensor, Tensor] | None:
        """Factor and summand [D] that turn the input of an `earlier` router into what this layer's
        norm would have made of the same hidden state; None where a norm is not known."""
        if self.gain is None or earlier.gain is None:
            return None
        assert self.offset is not None
        assert earlier.offset is not None
        # What a gain of 0 has erased cannot come back.
        known = earlier.gain != 0
        factor = torch.where(known, self.gain / torch.where(known, earlier.gain, 1), 0)
        return factor, self.offset - earlier.offset * factor


def plain_gate(
    weight: Tensor,
    top_k: int,
    *,
    bias: Tensor | None = None,
    correction: Tensor | None = None,
    gain: Tensor | None = None,
) -> Gate:
    """A gate that takes the `top_k` highest of `weight` [E, D] x + `bias`.

    With a `correction` [E] the choice is by sigmoid plus correction, as in DeepSeek-V3. `gain` [D]
    is the weight of the RMS norm before it. The weight is used where it is, not copied.
    """

    def values(hidden: Tensor) -> Tensor:
        found = linear(hidden.to(weight.dtype), weight, bias).float()
        return found if correction is None else found.sigmoid() + correction

    offset = None if gain is None else torch.zeros_like(gain, dtype=torch.float32)
    return Gate(values, top_k, None if gain is None else gain.float(), offset)


@torch.no_grad()
def gates_of(view: MoEView) -> list[Gate]:
    """The gates of a model's MoE layers, each a plain product where the family's rule is no more.

    A router that was asked before the first layer (Read-ME's pre-gating) has `routed_ahead`, which
    returns its values [T, E] of the pass that is running: then a prediction is exact.

    Raises UserError for a router that needs more than its input, such as token ids.
    """
    modules = dict(view.model.named_modules())
    return [_gate(layer, modules) for layer in view]


def _gate(layer: MoELayer, modules: dict[str, nn.Module]) -> Gate:
    ahead = getattr(layer.router, "routed_ahead", None)
    if ahead is not None:
        return Gate(lambda _: ahead(), layer.top_k)
    if layer.router_weight is None:
        raise UserError(f"{layer.name} has no router whose choice could be predicted by it")
    weight = layer.router_weight.detach()
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(PROBES, layer.router_width, generator=generator).to(weight.device)
    routing = layer.route(probe.to(weight.dtype))
    expected = routing.ids.sort(-1).values
    gain, offset = _norm_before(layer, modules) or (None, None)
    for correction in (None, layer.correction_bias):
        plain = plain_gate(
            weight[: layer.num_experts],
            layer.top_k,
            bias=None if layer.router_bias is None else layer.router_bias.detach(),
            correction=None if correction is None else correction.detach(),
        )
        fits = weight.shape[1] == probe.shape[1] and len(weight) == layer.num_experts
        if fits and torch.equal(_choice(plain, probe), expected):
            return Gate(plain.values, layer.top_k, gain, offset)
    return Gate(partial(_values_by_rule, layer), layer.top_k, gain, offset)


def _choice(gate: Gate, hidden: Tensor) -> Tensor:
    return gate.values(hidden).topk(gate.top_k, dim=-1).indices.sort(-1).values


@torch.no_grad()
def _values_by_rule(layer: MoELayer, hidden: Tensor) -> Tensor:
    """Values of which the highest are those that the family's own rule chooses.

    A rule with groups may leave out a high logit; each counts by its distance from the cut, on the
    side where the rule put it.
    """
    routing = layer.route(hidden.to(layer.dtype))
    assert routing.logits is not None
    logits = routing.logits.float()[:, : layer.num_experts]
    chosen = torch.zeros(len(logits), layer.num_experts + 1, dtype=torch.bool, device=logits.device)
    real = (routing.ids >= 0) & (routing.ids < layer.num_experts)
    chosen.scatter_(1, torch.where(real, routing.ids, layer.num_experts), True)
    chosen = chosen[:, :-1]
    last = logits.masked_fill(~chosen, float("inf")).amin(1, keepdim=True)
    first = logits.masked_fill(chosen, float("-inf")).amax(1, keepdim=True)
    distance = (logits - torch.nan_to_num((last + first) / 2, posinf=0.0, neginf=0.0)).abs()
    return torch.where(chosen, distance, -distance)


def _norm_before(layer: MoELayer, modules: dict[str, nn.Module]) -> tuple[Tensor, Tensor] | None:
    """Gain and offset [D] of the norm whose output the router gets."""
    parent = modules.get(layer.name.rpartition(".")[0])
    for name in NORM_NAMES:
        norm = getattr(parent, name, None)
        # longcat_flash has a list of two norms.
        if isinstance(norm, nn.Module) and not isinstance(norm, nn.ModuleList):
            return _affine(norm, layer.router_width)
    return None


def _affine(norm: nn.Module, width: int) -> tuple[Tensor, Tensor] | None:
    """What a norm multiplies by and adds, read from what it does.

    Alternating signs have mean 0 and variance 1, so that neither an RMS norm nor a layer norm
    changes them otherwise; families differ in whether the weight has 1 added.
    """
    parameter = next(norm.parameters(), None)
    if parameter is None or parameter.shape[-1] != width or width % 2:
        return None
    signs = torch.ones(1, width, dtype=parameter.dtype, device=parameter.device)
    signs[:, 1::2] = -1
    plus, minus = norm(signs).float()[0], norm(-signs).float()[0]
    return (plus - minus) / 2 * signs[0].float(), (plus + minus) / 2
