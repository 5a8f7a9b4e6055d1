"""Inputs of every matrix by parameter name, beside what hooks on the modules see."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moekit.core.find import find_moe
from moekit.core.view import MoEView
from moekit.profile.parameter_inputs import parameter_inputs
from tests.families.tiny import build_tiny

# gpt_oss stores its matrices transposed.
FAMILIES = ("mixtral", "gpt_oss")


def seen_by_linears(model: nn.Module, sequences: list[Tensor]) -> dict[str, Tensor]:
    found: dict[str, list[Tensor]] = {}
    handles = []
    for name, module in model.named_modules():
        if type(module) is nn.Linear:

            def see(module: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                found.setdefault(f"{name}.weight", []).append(args[0].flatten(0, -2))

            handles.append(module.register_forward_pre_hook(see))
    with torch.no_grad():
        for ids in sequences:
            model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["second", "absolute"])
def test_linears_have_the_means_of_their_inputs(family, kind) -> None:
    model = build_tiny(family)
    sequences = [torch.randint(1, 30, (1, n)) for n in (7, 12)]
    found = parameter_inputs(model, sequences, kind)
    for name, inputs in seen_by_linears(model, sequences).items():
        mean = inputs.T @ inputs if kind == "second" else inputs.abs().sum(0)
        # Sums of two sequences in another order.
        torch.testing.assert_close(found.values[name], mean / len(inputs), atol=1e-5, rtol=1e-4)
        assert found.axis[name] == -1


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_have_the_means_of_their_own_tokens(family) -> None:
    model = build_tiny(family)
    sequences = [torch.randint(1, 30, (1, 16))]
    calls: list[Any] = []
    with torch.no_grad(), MoEView(model).observe(calls.append):
        model(input_ids=sequences[0])
    found = parameter_inputs(model, sequences, "second")
    for site, call in zip(find_moe(model), calls, strict=True):
        name = f"{site.experts_path}.gate_up_proj"
        axis = found.axis[name]
        assert axis == (-2 if family == "gpt_oss" else -1)
        bank = model.get_parameter(name)
        moments = found.values[name]
        assert moments.shape == (len(bank), bank.shape[axis], bank.shape[axis])
        for expert in range(len(bank)):
            own = call.hidden[(call.ids == expert).any(-1)].float()
            wanted = own.T @ own / max(len(own), 1)
            torch.testing.assert_close(moments[expert], wanted, atol=1e-5, rtol=1e-4)


def test_passes_by_groups_of_layers_change_nothing() -> None:
    model = build_tiny("mixtral")
    sequences = [torch.randint(1, 30, (1, 9))]
    whole, parts = (parameter_inputs(model, sequences, "second", limit) for limit in (2**30, 1))
    assert whole.values.keys() == parts.values.keys()
    for name, value in whole.values.items():
        torch.testing.assert_close(parts.values[name], value)
