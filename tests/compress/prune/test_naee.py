"""NAEE against the double loop: the error itself, and the sets it finds."""

from __future__ import annotations

import itertools

import pytest
import torch

from moekit.compress.prune.naee import naee
from moekit.compress.prune.reconstruction import reconstruction_of
from moekit.compress.prune.saliency import score
from moekit.compress.prune.select import Room
from moekit.core.collect import Batch
from moekit.core.errors import UserError
from tests.compress.prune.common import tiny_stats, tiny_view, tokens
from tests.profile.common import padded_batch


@pytest.fixture(scope="module")
def view():
    return tiny_view()


def rooms(view, count: int, **fields) -> list[Room]:
    return [Room(layer.index, layer.num_experts, count, **fields) for layer in view]


@torch.no_grad()
def by_hand(view, batches, position: int, keep) -> float:
    """The layer on the same inputs with the others banned, by the double loop."""
    calls, layer = [], view[position]
    with view.observe(calls.append, logits=True, layers=[position]):
        for batch in batches:
            view.model(input_ids=batch.ids, attention_mask=batch.mask)
    gone = [e for e in range(layer.num_experts) if e not in keep]
    total = 0.0
    for call in calls:
        routing = layer.route_from_logits(call.logits, call.router_input, gone)
        change = layer.run_naive(call.hidden, call.ids, call.weights) - layer.run_naive(
            call.hidden, routing.ids, routing.weights
        )
        rows = slice(None) if call.mask is None else call.mask.bool()
        total += float(change[rows].norm())
    return total


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss", "mixtral"])
def test_error_is_that_of_the_double_loop(family):
    view = tiny_view(family)
    batches = [padded_batch(9), padded_batch(7, seed=1)]
    measured = reconstruction_of(view, batches, 1)
    per_group = 3 if family != "deepseek_v3" else 4
    for keep in (range(per_group + 2), [0, 1, 4, 5, 6, 7]):
        expected = by_hand(view, batches, 1, list(keep))
        # Products of outputs in place of outputs: float32 sums of numbers that cancel.
        assert measured.error(keep) == pytest.approx(expected, rel=1e-3, abs=1e-4)
    # Check (a): nothing is missing, so nothing changed.
    assert measured.error(range(view[1].num_experts)) == 0


def test_exact_search_finds_the_best_subset(view):
    found = naee(view, [tokens()], rooms(view, 3))
    assert found.complete
    assert found.evaluations == 2 * 56
    for position in range(len(view)):
        measured = reconstruction_of(view, [tokens()], position)
        errors = {k: measured.error(k) for k in itertools.combinations(range(8), 3)}
        assert tuple(found.keep[position]) == min(errors, key=lambda k: errors[k])


def test_never_worse_than_the_best_by_any_score(view):
    # Check (b).
    found, stats = naee(view, [tokens()], rooms(view, 4)), tiny_stats(view)
    for method in ("reap", "frequency", "man", "easy-ep", "random"):
        for position, (room, scores) in enumerate(
            zip(rooms(view, 4), score(stats, method), strict=True)
        ):
            measured = reconstruction_of(view, [tokens()], position)
            assert found.errors[position] <= measured.error(room.best(scores))


def test_everything_stays_when_nothing_is_to_go(view):
    for how in ("exact", "descent"):
        found = naee(view, [tokens()], rooms(view, 8), how=how)
        assert found.keep == [list(range(8))] * 2
        assert found.errors == [0, 0]


def test_descent_is_a_local_optimum_that_respects_protection(view):
    asked = rooms(view, 4, protected=frozenset({6}))
    found = naee(view, [tokens()], asked, how="descent")
    for position, room in enumerate(asked):
        assert 6 in found.keep[position]
        measured = reconstruction_of(view, [tokens()], position)
        best = min(measured.error(keep) for keep in room.exchanges(found.keep[position]))
        assert found.errors[position] <= best
    exact = naee(view, [tokens()], asked)
    assert all(e <= d for e, d in zip(exact.errors, found.errors, strict=True))


def test_progressive_measures_on_the_pruned_model(view):
    batches = [tokens()]
    found = naee(view, batches, rooms(view, 3), mode="progressive")
    layerwise = naee(view, batches, rooms(view, 3))
    assert found.keep[0] == layerwise.keep[0]
    gone = [e for e in range(8) if e not in found.keep[0]]
    with view.ban_experts({0: gone}):
        measured = reconstruction_of(view, batches, 1)
    errors = {k: measured.error(k) for k in itertools.combinations(range(8), 3)}
    assert found.errors[1] == pytest.approx(min(errors.values()))
    assert found.errors[1] != pytest.approx(layerwise.errors[1])


def test_padding_does_not_count(view):
    padded = padded_batch(9)
    longer = Batch(
        torch.cat([padded.ids, torch.randint(3, 100, (3, 4))], 1),
        torch.cat([padded.mask, torch.zeros(3, 4, dtype=torch.long)], 1),
        padded.domains,
    )
    first, second = (reconstruction_of(view, [b], 0).error([0, 1, 2]) for b in (padded, longer))
    assert first == pytest.approx(second, rel=1e-4)


def test_interrupted_search_goes_on(view, tmp_path):
    asked, state = rooms(view, 3), tmp_path / "search.json"

    class Stop(Exception):
        pass

    def stop(done, total):
        raise Stop

    with pytest.raises(Stop):
        naee(view, [tokens()], asked, state=state, progress=stop)
    seen = []
    found = naee(view, [tokens()], asked, state=state, progress=lambda d, t: seen.append((d, t)))
    assert seen == [(2, 2)]
    assert found.keep == naee(view, [tokens()], asked).keep
    with pytest.raises(UserError, match="is of a search with mode layerwise, not progressive"):
        naee(view, [tokens()], asked, state=state, mode="progressive")
    state.write_text("{}")
    with pytest.raises(UserError, match="is no state of a search"):
        naee(view, [tokens()], asked, state=state)


def test_too_many_subsets_are_refused_before_anything_runs(view):
    with pytest.raises(UserError, match=r"70 subsets of 4 out of 8 experts .* 50; .* how=descent"):
        naee(view, [], rooms(view, 4), max_evaluations=50)


def test_a_budget_ends_the_search_with_an_answer(view):
    for how in ("exact", "descent"):
        found = naee(view, [tokens()], rooms(view, 3), how=how, max_seconds=0.0)
        assert not found.complete
        assert all(len(keep) == 3 for keep in found.keep)
        assert found.evaluations <= 16


def test_families_without_a_weighted_sum_are_refused():
    view = tiny_view("llama4")
    with pytest.raises(UserError, match="weighs the inputs"):
        reconstruction_of(view, [tokens()], 0)
