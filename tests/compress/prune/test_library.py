"""Task libraries: what they keep, whom a query finds, and the files."""

from __future__ import annotations

import json

import pytest
import torch

from moekit.compress.prune.library import TaskLibrary
from moekit.compress.prune.saliency import score
from moekit.compress.prune.select import Room
from moekit.core.collect import Batch
from moekit.core.errors import UserError
from moekit.profile import profile
from tests.compress.prune.common import made_stats, tiny_view


@pytest.fixture(scope="module")
def view():
    return tiny_view()


def text(low: int, high: int, seed: int = 0, rows: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, (rows, 60), generator=generator)


def task_batches() -> list[Batch]:
    """Two tasks that use different halves of the vocabulary."""
    return [Batch(text(3, 50), None, ["low"] * 8), Batch(text(50, 100), None, ["high"] * 8)]


@pytest.fixture(scope="module")
def stats(view):
    return profile(view, task_batches())


def rooms(view, count: int) -> list[Room]:
    return [Room(layer.index, layer.num_experts, count) for layer in view]


@pytest.mark.parametrize("method", ["tcess", "reap", "frequency"])
def test_orders_give_the_best_of_every_layer_for_every_count(view, stats, method):
    # Check (a) of PreMoe, with the paper's permutations made from the orders.
    library = TaskLibrary.of(stats, method)
    for domain, task in library.tasks.items():
        scores = score(stats, method, domain=domain)
        first = task.orders[0]
        for position, order in enumerate(task.orders):
            permutation = {first[rank]: order[rank] for rank in range(8)}
            for count in range(1, 9):
                expected = Room(0, 8, count).best(scores[position])
                assert sorted(permutation[e] for e in first[:count]) == expected
                assert library.keep(domain, rooms(view, count))[position] == expected


@pytest.mark.parametrize("top1", [False, True])
def test_a_task_finds_itself(view, stats, top1):
    # Check (b) of PreMoe: with its own text exactly, with other text of its kind nearest.
    library = TaskLibrary.of(stats, top1=top1)
    for batch in task_batches():
        name, distance = library.nearest(library.key_of(view, [batch]))[0]
        assert name == batch.domains[0]
        # The same sums; one batch instead of several, in float64.
        assert distance < 1e-12
    assert library.nearest(library.key_of(view, [text(3, 50, seed=9)]))[0][0] == "low"
    assert library.nearest(library.key_of(view, [text(50, 100, seed=9)]))[0][0] == "high"


def test_a_query_runs_the_first_moe_layer_only(view, stats):
    library, seen = TaskLibrary.of(stats), []
    with view.observe(lambda call: seen.append(call.layer.position)):
        library.key_of(view, [text(3, 50)])
    assert seen == [0]


def test_keeping_everything_changes_no_bit(view, stats):
    # Check (c) of PreMoe.
    library, ids = TaskLibrary.of(stats), text(3, 50)
    with torch.no_grad():
        expected = view.model(ids).logits
        with library.serving(view, "low", rooms(view, 8)):
            assert torch.equal(view.model(ids).logits, expected)


def test_only_the_task_s_experts_run(view, stats):
    library, seen = TaskLibrary.of(stats), []
    kept = library.keep("high", rooms(view, 3))
    with library.serving(view, "high", rooms(view, 3)), view.observe(seen.append):
        view.model(text(3, 50))
    for call in seen:
        assert set(call.ids.flatten().tolist()) <= set(kept[call.layer.position])


def test_files(view, stats, tmp_path):
    library = TaskLibrary.of(stats)
    library.save(tmp_path / "library.json")
    assert TaskLibrary.load(tmp_path / "library.json") == library


def test_refusals(stats, tmp_path):
    library, path = TaskLibrary.of(stats), tmp_path / "library.json"
    with pytest.raises(UserError, match="no task 'x'; it has high, low"):
        library.keep("x", [])
    with pytest.raises(UserError, match="kept_logit_sum"):
        TaskLibrary.of(made_stats([[1, 1]]), "frequency")
    with pytest.raises(UserError, match="cannot be read"):
        TaskLibrary.load(path)
    library.save(path)
    good = json.loads(path.read_text())
    for change, message in (
        ({"format": "x"}, "not moekit.task-library"),
        ({"tasks": {"low": {"key": [0.0] * 8, "orders": [[0, 0]]}}}, "orders of task 'low'"),
        ({"model": {}}, "damaged"),
    ):
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(UserError, match=message):
            TaskLibrary.load(path)
    path.write_text("[]")
    with pytest.raises(UserError, match="no task library"):
        TaskLibrary.load(path)
