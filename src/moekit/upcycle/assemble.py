"""Putting a MoE together: the tensors that stay, and experts, routers and shared experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from moekit.core.architecture import meta_model
from moekit.core.deferred import Deferred
from moekit.core.errors import UserError
from moekit.core.find import find_moe
from moekit.upcycle.ffn import FFN, PARTS, constant, neurons, scaled
from moekit.upcycle.targets import INERT_WIDTH, Target

EXPERT_PARTS = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")


@dataclass(frozen=True)
class MoEParts:
    """One MoE layer: its experts in order, the router's rows [E, D], and the shared expert.

    `shared_gate` [1, D] is for the families whose shared expert has a gate; zero unless given.
    """

    experts: Sequence[FFN]
    router: Tensor
    shared: FFN | None = None
    shared_gate: Tensor | None = None


def assemble(
    target: Target,
    config: PretrainedConfig,
    kept: Mapping[str, Deferred],
    layers: Mapping[int, MoEParts],
) -> dict[str, Deferred]:
    """Every tensor of the model of `config`, by parameter name.

    `kept` are the tensors of the dense model, of which the feed-forward networks of `layers` (by
    decoder layer) are left out. Raises `UserError` for tensors that have no place in the model.
    """
    model = meta_model(config)
    expected = model.state_dict()
    made = {name: tensor for name, tensor in kept.items() if name in expected}
    for site in find_moe(model):
        parts = layers[site.layer_index]
        gate_up: Any = torch.stack([_cat(ffn.gate, ffn.up) for ffn in parts.experts])
        down: Any = torch.stack([_plain(ffn.down) for ffn in parts.experts])
        made[f"{site.experts_path}.gate_up_proj"] = gate_up
        made[f"{site.experts_path}.down_proj"] = down
        router = f"{site.router_path}.weight"
        made[router] = constant(parts.router.to(down.dtype))
        shared = parts.shared
        if shared is None and target.shared_required:
            # The gradient of its down projection is not zero: training may wake it.
            shared = scaled(neurons(parts.experts[0], torch.arange(INERT_WIDTH)), 0.0)
        for part, suffix in zip(PARTS, EXPERT_PARTS, strict=True) if shared else ():
            made[f"{site.path}.{target.shared}.{suffix}"] = getattr(shared, part)
        for name in expected:
            if name.startswith(f"{site.path}.") and name.endswith(target.zeros or ("\0",)):
                given = parts.shared_gate
                value = given if given is not None and name.endswith("gate.weight") else None
                # Correction biases insist on float32 whatever the weights are.
                dtype = torch.float32 if "bias" in name else down.dtype
                empty = torch.zeros(expected[name].shape)
                made[name] = constant((empty if value is None else value).to(dtype))
    used = {f"model.layers.{layer}.mlp.{suffix}" for layer in layers for suffix in EXPERT_PARTS}
    lost = sorted(set(kept) - set(expected) - used)
    if lost:
        raise UserError(
            f"{len(lost)} tensors have no place in a {config.model_type}; the first is {lost[0]}."
        )
    return made


def _cat(first: Deferred, second: Deferred) -> Tensor:
    return torch.cat([_plain(first), _plain(second)])


def _plain(tensor: Any) -> Tensor:
    assert isinstance(tensor, Deferred)
    return tensor
