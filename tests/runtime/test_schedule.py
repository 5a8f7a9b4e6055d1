"""Schedules against brute force and against the figures of their papers."""

import itertools
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from moekit.core.errors import UserError
from moekit.core.view import MoEView
from moekit.runtime.schedule.batches import most_alike
from moekit.runtime.schedule.fallback import PlaneFallback
from moekit.runtime.schedule.read_order import hottest_first
from moekit.runtime.schedule.sharing import SharedExperts, shared_by_sequence, shared_by_vote
from moekit.runtime.schedule.split import (
    ExpertLoad,
    SplitCosts,
    fiddler_split,
    greedy_split,
    on_demand_split,
    prefetch_impact,
    split_seconds,
    static_split,
)
from tests.families.tiny import build_tiny

# Milliseconds, the constants of HybriMoE's released code.
COSTS = SplitCosts(cpu_token=1.0, cpu_start=0.79, gpu_expert=0.5, transfer=0.418)


def layers(count, seed=0):
    """Random layers of 3 to 8 experts with 1 to 4 tokens each."""
    random = np.random.default_rng(seed)
    for _ in range(count):
        size = int(random.integers(3, 9))
        yield [
            ExpertLoad(e, int(random.integers(1, 5)), bool(random.random() < 0.5))
            for e in range(size)
        ]


def best_seconds(loads, costs):
    """The shortest layer over all assignments; the GPU runs cached experts first."""
    ordered = sorted(loads, key=lambda load: (not load.cached, -load.tokens))
    found = math.inf
    for there in itertools.product((True, False), repeat=len(ordered)):
        gpu = [load for load, on in zip(ordered, there, strict=True) if on]
        cpu = [load for load, on in zip(ordered, there, strict=True) if not on]
        found = min(found, split_seconds(gpu, cpu, costs))
    return found


def test_the_greedy_split_is_near_the_optimum():
    """The figures of the methods' survey: 1.04 on average, 1.26 at worst; the others far off."""
    ratios = {name: [] for name in ("greedy", "static", "demand", "fiddler")}
    rules = (greedy_split, static_split, on_demand_split, fiddler_split)
    for loads in layers(300):
        best = best_seconds(loads, COSTS)
        for values, rule in zip(ratios.values(), rules, strict=True):
            values.append(rule(loads, COSTS).seconds / best)
    mean = {name: float(np.mean(values)) for name, values in ratios.items()}
    assert min(ratios["greedy"]) >= 1 - 1e-9
    assert mean["greedy"] == pytest.approx(1.04, abs=0.02)
    assert max(ratios["greedy"]) < 1.35
    assert mean["greedy"] < mean["demand"] < mean["static"]


@pytest.mark.parametrize("rule", [greedy_split, static_split, on_demand_split, fiddler_split])
def test_every_expert_runs_once_and_the_time_is_that_of_the_order(rule):
    for loads in layers(50, seed=1):
        split = rule(loads, COSTS)
        assert sorted([*split.gpu, *split.cpu]) == [load.expert for load in loads]
        by_id = {load.expert: load for load in loads}
        seconds = split_seconds([by_id[e] for e in split.gpu], [by_id[e] for e in split.cpu], COSTS)
        assert split.seconds == pytest.approx(seconds)


def test_a_slow_cpu_gives_on_demand_and_a_slow_link_the_static_split():
    slow_cpu = SplitCosts(cpu_token=1e9, gpu_expert=0.5, transfer=0.4)
    slow_link = SplitCosts(cpu_token=1.0, gpu_expert=1e-6, transfer=1e9)
    for loads in layers(50, seed=2):
        assert greedy_split(loads, slow_cpu) == on_demand_split(loads, slow_cpu)
        found, expected = greedy_split(loads, slow_link), static_split(loads, slow_link)
        assert set(found.gpu) == set(expected.gpu)


def test_transfers_run_beside_computing_by_hand():
    loads = [ExpertLoad(0, 1, True), ExpertLoad(1, 9, False), ExpertLoad(2, 8, False)]
    # The GPU computes 0 until 0.5, waits for 1 until 0.8, and has 2 at 1.6.
    costs = SplitCosts(cpu_token=1.0, gpu_expert=0.5, transfer=0.8)
    assert on_demand_split(loads, costs).seconds == pytest.approx(0.8 + 0.5 + 0.3 + 0.5)


def test_prefetching_pays_most_for_what_the_layer_waits_for():
    loads = [ExpertLoad(0, 4, False), ExpertLoad(1, 1, True)]
    ((expert, saved),) = prefetch_impact(loads, COSTS)
    assert expert == 0
    first = greedy_split(loads, COSTS).seconds
    cached = greedy_split([ExpertLoad(0, 4, True), ExpertLoad(1, 1, True)], COSTS).seconds
    assert saved == pytest.approx(first - cached)
    for loads in layers(50, seed=3):
        gains = [gain for _, gain in prefetch_impact(loads, COSTS)]
        assert gains == sorted(gains, reverse=True)


def seconds_of(order, counts, read, token):
    """A layer that reads experts in this order and computes what has come, one at a time each."""
    arrived = done = 0.0
    for expert in order:
        arrived += read
        done = max(done, arrived) + counts[expert] * token
    return done


def test_no_order_of_reads_beats_the_hottest_first():
    random = np.random.default_rng(0)
    gain = []
    for _ in range(20):
        counts = random.integers(1, 12, 6)
        order = hottest_first(counts)
        assert sorted(order) == list(range(6))
        all_orders = [seconds_of(o, counts, 1.0, 0.2) for o in itertools.permutations(range(6))]
        assert seconds_of(order, counts, 1.0, 0.2) == pytest.approx(min(all_orders))
        gain.append(seconds_of(range(6), counts, 1.0, 0.2) / min(all_orders))
    assert np.mean(gain) > 1.02
    assert hottest_first([2, 5, 2, 5]).tolist() == [1, 3, 0, 2]


def usages(kinds, seed=0):
    """Expected uses [2, 8] of requests of two kinds, with noise."""
    random = np.random.default_rng(seed)
    two = random.random((2, 2, 8))
    return [two[kind] + random.random((2, 8)) / 10 for kind in kinds]


@pytest.mark.parametrize("seed", range(5))
def test_alike_requests_run_together(seed):
    waiting, running = usages([0, 1, 0, 1, 1, 0, 1], seed), usages([1, 1], seed)
    chosen = most_alike(waiting, running)
    assert chosen in (1, 3, 4, 6)
    batch = [*running, waiting[chosen]]
    assert most_alike(waiting, batch) in (1, 3, 4, 6)


def test_the_first_goes_first_where_nothing_says_otherwise():
    waiting = usages([0, 1, 1])
    assert most_alike(waiting, []) == 0
    assert most_alike(waiting[:1], waiting) == 0
    assert most_alike([waiting[0]] * 3, [waiting[0]]) == 0


def test_voting_keeps_more_of_what_tokens_want_at_equal_size():
    """The methods' survey: recall .82 against .77, weight .89 against .86 at N 32, E 64, K 8."""
    generator = torch.Generator().manual_seed(0)
    recall, mass = {"seq": [], "vote": []}, {"seq": [], "vote": []}
    for _ in range(40):
        bias = torch.randn(64, generator=generator)
        logits = torch.randn(32, 64, generator=generator) + bias
        by_sequence = shared_by_sequence(logits, 1)
        masks = {"seq": by_sequence, "vote": shared_by_vote(logits, 8, int(by_sequence.sum()))}
        best = logits.softmax(-1).topk(8)
        for name, mask in masks.items():
            inside = mask[best.indices]
            recall[name].append(float(inside.float().mean()))
            mass[name].append(float((best.values * inside).sum() / best.values.sum()))
    assert np.mean(recall["vote"]) > np.mean(recall["seq"]) + 0.02
    assert np.mean(mass["vote"]) > np.mean(mass["seq"]) + 0.01


def run(view, ids, transform=None):
    context = nullcontext() if transform is None else view.transform_routing(transform)
    with torch.no_grad(), context, view.trace() as trace:
        logits = view.model(ids).logits
    return logits, [
        len(torch.unique(trace.layer(position).topk_ids)) for position in range(len(view))
    ]


def test_sharing_everything_is_the_model_itself():
    view = MoEView(build_tiny("qwen3_moe"))
    ids = torch.arange(2, 10)[None]
    plain, used = run(view, ids)
    assert torch.equal(run(view, ids, SharedExperts(share=1.0))[0], plain)
    assert torch.equal(run(view, ids, SharedExperts(max_tokens=7, share=0.1))[0], plain)
    one = ids[:, :1]
    assert torch.equal(run(view, one, SharedExperts(share=0.01))[0], run(view, one)[0])
    shared, few = run(view, ids, SharedExperts(share=0.01))
    assert few == [layer.top_k for layer in view] < used
    assert not torch.equal(shared, plain)


@pytest.mark.parametrize("by", ["sequence", "vote"])
def test_the_set_is_never_smaller_than_a_token_needs(by):
    logits = torch.zeros(5, 16)
    logits[:, 3] = 9
    chosen = SharedExperts(by=by, per_token=1, share=0.01).chosen(logits, 4)
    assert chosen[3]
    assert int(chosen.sum()) == 4


def test_sharing_refuses_what_it_cannot_keep():
    view = MoEView(build_tiny("deepseek_v3"))
    with pytest.raises(UserError, match="correction bias"):
        run(view, torch.arange(2, 10)[None], SharedExperts())
    with pytest.raises(UserError, match="share 0"):
        SharedExperts(share=0)


def test_only_light_experts_that_are_missing_fall_back():
    fallback = PlaneFallback(max_weight=0.2)
    weights, whole = [0.1, 0.3, 0.2, 0.1], [False, False, False, True]
    assert fallback.falls_back(weights, whole).tolist() == [True, False, True, False]
    exact = PlaneFallback(max_weight=0.0)
    assert exact.falls_back([1e-6], [False]).tolist() == [False]
    with pytest.raises(UserError, match="max_weight 2"):
        PlaneFallback(max_weight=2)
