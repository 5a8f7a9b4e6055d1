"""MoE merged with MoE: permuted twins are recovered, and merging by index loses to alignment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from moekit.core.errors import UserError
from moekit.core.new_experts import select_neurons
from moekit.core.spec import spec_of
from moekit.core.view import MoEView
from moekit.merge.recipe import merge_from_dict
from moekit.merge.run import merge
from tests.families.tiny import build_tiny, tiny_inputs

# Stored in turn: by expert; fused; groups and a correction bias; biases, rows of gate and up mixed.
FAMILIES = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss")


def moved(model: PreTrainedModel, size: float, seed: int) -> PreTrainedModel:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor += size * torch.randn(tensor.shape, generator=draw)
    return model


@torch.no_grad()
def permuted(model: PreTrainedModel) -> PreTrainedModel:
    """The same function with experts, within groups of the router, and neurons in random order."""
    draw = torch.Generator().manual_seed(3)
    for layer, spec in zip(MoEView(model), spec_of(model).per_layer, strict=True):
        size = spec.num_experts // max(spec.num_groups, 1)
        order = [
            first + int(e)
            for first in range(0, spec.num_experts, size)
            for e in torch.randperm(size, generator=draw)
        ]
        experts = [layer.expert_views(e).clone() for e in order]
        for place, expert in enumerate(experts):
            neurons = torch.randperm(spec.expert_width, generator=draw)
            layer.set_expert(place, select_neurons(expert, neurons))
        for name, tensor in layer.block.state_dict().items():
            if not name.startswith("experts.") and tensor.shape[:1] == (spec.num_experts,):
                tensor.copy_(tensor[order].clone())
    return model


def saved(model: PreTrainedModel, path: Path) -> str:
    model.save_pretrained(path)
    return str(path)


def state(path: Path, family: str) -> dict[str, Tensor]:
    return type(build_tiny(family)).from_pretrained(path).state_dict()


def average(*names: str, **extra: Any) -> dict[str, Any]:
    models = [{"model": name, "parameters": {"weight": 1.0}} for name in names]
    return {"merge_method": "linear", "models": models, **extra}


@pytest.mark.parametrize("family", FAMILIES)
def test_permuted_twins_are_recovered(family: str, tmp_path: Path) -> None:
    first = saved(build_tiny(family), tmp_path / "first")
    second = saved(moved(build_tiny(family), 0.002, seed=1), tmp_path / "second")
    other = permuted(moved(build_tiny(family), 0.002, seed=1))
    twin = saved(other, tmp_path / "twin")
    plain = merge_from_dict(average(first, second))
    merge(plain, tmp_path / "wanted")
    merge(merge_from_dict(average(first, twin, align="experts")), tmp_path / "aligned")
    merge(merge_from_dict(average(first, twin)), tmp_path / "by_index")
    wanted, aligned, by_index = (
        state(tmp_path / name, family) for name in ("wanted", "aligned", "by_index")
    )
    assert all(torch.equal(aligned[name], tensor) for name, tensor in wanted.items())
    assert not all(torch.equal(by_index[name], tensor) for name, tensor in wanted.items())


def test_alignment_keeps_the_function_that_merging_by_index_loses(tmp_path: Path) -> None:
    first = saved(build_tiny("mixtral"), tmp_path / "first")
    twin = saved(permuted(build_tiny("mixtral")), tmp_path / "twin")
    inputs = tiny_inputs("mixtral", build_tiny("mixtral"))
    expected = build_tiny("mixtral")(**inputs).logits
    errors = {}
    for name, extra in (("aligned", {"align": "experts"}), ("by_index", {})):
        merge(merge_from_dict(average(first, twin, **extra)), tmp_path / name)
        model = type(build_tiny("mixtral")).from_pretrained(tmp_path / name)
        errors[name] = float((model(**inputs).logits - expected).detach().abs().max())
    assert errors["aligned"] < 1e-6
    assert errors["by_index"] > 100 * max(errors["aligned"], 1e-7)


def test_what_cannot_be_aligned(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="align 'neurons'"):
        merge_from_dict(average("a", "b", align="neurons"))
    config = build_tiny("mixtral").config
    config.num_local_experts = 2
    larger = saved(build_tiny("mixtral"), tmp_path / "larger")
    smaller = saved(build_tiny("mixtral", config=config), tmp_path / "smaller")
    with pytest.raises(UserError, match="experts in"):
        merge(merge_from_dict(average(larger, smaller, align="experts")), tmp_path / "out")
    assert not (tmp_path / "out").exists()
