"""What holds for every merge method of the registry, in both dialects."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moekit.core.registry import registry
from moekit.merge.catalogue import merge_methods
from moekit.merge.job import REQUIRED, MergeMethod, TensorJob

# Those that learn from text look at whole models first: tests/merge/test_learned.py.
NAMES = [m.name for m in registry.methods(kind="merge") if "data" not in m.needs]
DIALECTS = ("mergekit", "paper")
# Methods that change a single model too, and why.
CHANGES_ONE_MODEL = {
    "arcee_fusion": "takes over outliers only",
    "pcb": "cuts magnitudes at quantiles, and the smallest entry always goes",
    "iso_c": "makes singular values equal",
    "iso_cts": "makes singular values equal",
    "r_tsvm": "keeps the leading directions of a sparse task vector",
}
# Everything stays, and the other model is the result.
WHOLE = {"density": 1.0, "t": 1e3, "epsilon": 0.0}


def models(count: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(11)
    return [torch.randn(12, 9, generator=draw) for _ in range(count)]


def merged(
    method: MergeMethod, base: Tensor, tensors: list[Tensor], draws: list[int], **given: list[Any]
) -> Tensor:
    per_model = {
        key: given.get(key, [1 / len(tensors) if default is REQUIRED else default] * len(tensors))
        for key, default in method.per_model.items()
    }
    options = {
        key: given[key][0] if key in given else default for key, default in method.options.items()
    }
    assert REQUIRED not in options.values()
    job = TensorJob(
        "model.layers.0.mlp.up_proj.weight",
        None if method.base == "none" else base,
        tensors,
        per_model,
        options,
        torch.float32,
        lambda number: torch.Generator().manual_seed(draws[number]),
    )
    method.check(len(tensors), has_base=job.base is not None)
    return torch.cat([block for _, block in method.run(job)])


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("name", NAMES)
def test_one_model_kept_whole_is_that_model(name: str, dialect: str) -> None:
    method = merge_methods(dialect)[name]
    base, model = models(2)
    count = method.models[0]
    given: dict[str, list[Any]] = {key: [value] * count for key, value in WHOLE.items()}
    if name == "slerp":
        given["t"] = [1.0]
    found = merged(method, base, [model] * count, list(range(count)), **given)
    # Angles between equal vectors are known to about the root of an ulp of float32.
    same = bool(torch.isclose(found, model, atol=2e-5, rtol=0).all())
    assert same != (name in CHANGES_ONE_MODEL)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_models_changes_rounding_only(name: str, dialect: str) -> None:
    method = merge_methods(dialect)[name]
    least, most = method.models
    if most == 1:
        assert least == 1
        return
    count = most or 3
    base, *tensors = models(1 + count)
    order = [2, 0, 1] if count == 3 else [1, 0]
    given: dict[str, list[Any]] = {"weight": [0.5, 0.3, 0.4][:count]}
    for key, values in (("density", [0.5, 0.3, 0.7]), ("gamma", [0.02, 0.1, 0.05])):
        if key in method.per_model:
            given[key] = values[:count]
    first = merged(method, base, tensors, list(range(count)), **given)
    turned = {key: [values[i] for i in order] for key, values in given.items()}
    second = merged(method, base, [tensors[i] for i in order], order, **turned)
    # Sums in another order; decompositions lose two digits to it.
    torch.testing.assert_close(first, second, atol=1e-4, rtol=0)
    assert not torch.allclose(first, tensors[0], atol=1e-2)
