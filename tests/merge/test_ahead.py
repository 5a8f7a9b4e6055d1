"""Tensors that are computed ahead: the same bytes in the same order, whatever the threads."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from moekit.core.errors import UserError
from moekit.core.seeds import generator
from moekit.merge import ahead
from moekit.merge.catalogue import merge_methods
from moekit.merge.job import TensorJob
from moekit.merge.plan import MergedTensor


def tensors(count: int = 6) -> dict[str, MergedTensor]:
    method = merge_methods("mergekit")["dare_ties"]
    made = {}
    for number in range(count):
        draw = torch.Generator().manual_seed(number)
        base, a, b = torch.randn(3, 40, 8 + number, generator=draw)
        name = f"layers.{number}.w"
        job = TensorJob(
            name,
            base,
            [a, b],
            {"weight": [0.5, 0.5], "density": [0.5, 0.5]},
            dict(method.options),
            torch.float32,
            lambda model, name=name: generator(0, f"{name} {model}"),
        )
        made[name] = MergedTensor(method, job, torch.bfloat16)
    return made


def whole(found: dict[str, ahead.AheadTensor], first: int = 0) -> list[Tensor]:
    return [torch.cat([rows for _, rows in one.pieces(first)]) for one in found.values()]


@pytest.mark.parametrize("budget", [0, 40_000, 10**9], ids=["none", "some", "all"])
def test_ahead_is_what_each_tensor_gives_alone(monkeypatch, budget) -> None:
    monkeypatch.setattr(ahead, "BUDGET_BYTES", budget)
    threads = torch.get_num_threads()
    alone = [torch.cat([rows for _, rows in one.pieces()]) for one in tensors().values()]
    with ahead.computed_ahead(tensors()) as found:
        assert all(torch.equal(a, b) for a, b in zip(whole(found), alone, strict=True))
    assert torch.get_num_threads() == threads


def test_a_resumed_writer_asks_for_the_rest_only() -> None:
    every = tensors()
    names = list(every)
    with ahead.computed_ahead(every) as found:
        rest = torch.cat([rows for _, rows in found[names[2]].pieces(7)])
        after = torch.cat([rows for _, rows in found[names[3]].pieces()])
    assert torch.equal(rest, torch.cat([rows for _, rows in every[names[2]].pieces()])[7:])
    assert torch.equal(after, torch.cat([rows for _, rows in every[names[3]].pieces()]))


def test_an_error_in_a_thread_reaches_the_writer() -> None:
    every = tensors(3)
    name = list(every)[1]
    given = {**every[name].job.per_model, "density": [0.0, 0.5]}
    every[name] = dataclasses.replace(
        every[name], job=dataclasses.replace(every[name].job, per_model=given)
    )
    with (
        pytest.raises(UserError, match="density is 0"),
        ahead.computed_ahead(every) as found,
    ):
        whole(found)
