"""COMET: the checks of its method section, trees and local search."""

import math

import pytest
import torch

from moekit.core.errors import UserError
from moekit.layers import RouterContext, build_router
from moekit.layers.routers.local_search import PERMUTATION, permutation_entropy
from moekit.layers.routers.trees import LEAVES, leaf_entropy, leaf_probabilities, smooth_step

D, T, TREES = 16, 30, 2


def hidden(seed: int = 0) -> torch.Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(seed))


def router(experts: int, spread: float | None = None, **options):
    torch.manual_seed(1)
    made = build_router("comet", D, experts, TREES, **options)
    if spread is not None:
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter, std=spread)
    return made


def context(**fields) -> RouterContext:
    return RouterContext(1, T, **fields)


def test_the_smooth_step_reaches_zero_and_one_exactly_and_is_smooth_between():
    gamma = 2.0
    at = smooth_step(torch.tensor([-1.5, -1.0, 0.0, 0.5, 1.0, 7.0]), gamma)
    inner = -2 / 8 * 0.125 + 3 / 4 * 0.5 + 0.5
    assert at.tolist() == [0.0, 0.0, 0.5, inner, 1.0, 1.0]
    values = torch.linspace(-1.3, 1.3, 201, dtype=torch.float64).requires_grad_()
    made = smooth_step(values, gamma)
    made.sum().backward()
    assert (made.detach().diff() >= 0).all()
    # No jump of the slope either: it changes by less than its largest curvature times the step.
    assert values.grad.diff().abs().max() < 0.05


@pytest.mark.parametrize("experts", [2, 3, 5, 6, 8, 13])
def test_leaves_are_numbered_as_a_heap_for_any_number_of_experts(experts):
    left = torch.rand(4, experts - 1, generator=torch.Generator().manual_seed(2))
    found = leaf_probabilities(left)
    expected = torch.ones(4, 2 * experts - 1)
    for node in range(experts - 1):
        expected[:, 2 * node + 1] = expected[:, node] * left[:, node]
        expected[:, 2 * node + 2] = expected[:, node] * (1 - left[:, node])
    torch.testing.assert_close(found, expected[:, experts - 1 :])
    torch.testing.assert_close(found.sum(1), torch.ones(4))


@pytest.mark.parametrize("experts", [5, 8])
def test_weights_are_a_distribution_and_every_expert_is_reached_at_the_start(experts):
    routing = router(experts)(hidden(), context())
    total = torch.zeros(T).index_add(0, routing.token, routing.weight)
    torch.testing.assert_close(total, torch.ones(T))
    assert (routing.weight > 0).all()
    assert len(routing.token) == T * experts
    torch.testing.assert_close(routing.logits.softmax(-1), routing.scores)


def test_hard_splits_leave_at_most_one_expert_a_tree():
    # Splits of a narrow step and large weights: practically none lands inside of it.
    routing = router(8, spread=5.0, gamma=1e-4)(hidden(), context())
    reach = routing.extra[LEAVES]
    assert torch.equal(reach, reach.round())
    assert torch.bincount(routing.token, minlength=T).max() <= TREES
    assert leaf_entropy(routing).item() == pytest.approx(0, abs=1e-5)


def test_gradients_are_finite_where_branches_are_cut():
    made = router(8, spread=2.0, gamma=5.0)
    routing = made(hidden(), context())
    assert (routing.extra[LEAVES] == 0).any()
    (routing.weight * torch.arange(len(routing.weight))).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in made.parameters())
    assert made.split.grad.any()


def test_the_entropy_of_even_trees_is_that_of_a_uniform_leaf():
    made = router(8)
    with torch.no_grad():
        made.split.zero_()
        made.split_bias.zero_()
    value = leaf_entropy(made(hidden(), context()))
    assert value.item() == pytest.approx(TREES * math.log(8), rel=1e-4)


def test_the_regulariser_brings_the_trees_down_to_one_expert_each():
    made = router(8)
    optimizer = torch.optim.Adam(made.parameters(), lr=0.2)
    active = []
    for _ in range(120):
        routing = made(hidden(), context(training=True))
        active.append(len(routing.token) / T)
        optimizer.zero_grad()
        leaf_entropy(routing).backward()
        optimizer.step()
    assert active[0] == 8
    assert active[-1] <= TREES


def search(base: str = "softmax-renormalised", steps: int = 10):
    torch.manual_seed(0)
    made = build_router("local-search", D, 6, 2, base=base, steps=steps)
    torch.nn.init.normal_(made.router.score.weight)
    return made


def test_the_soft_permutation_is_doubly_stochastic_and_hardens_as_it_cools():
    made = search()
    for step in range(0, 11, 2):
        permutation = made.soft_permutation(step).detach()
        torch.testing.assert_close(permutation.sum(1), torch.ones(6))
    warm, cold = (made.soft_permutation(step).detach() for step in (0, 10))
    # Twenty iterations at the first temperature; the last ones are too cold for 150 to balance the
    # columns, which is why the search ends in an assignment and not in the last P.
    assert (warm.sum(0) - 1).abs().max() < 1e-2
    assert cold.max(1).values.mean() > warm.max(1).values.mean()
    assert made.expert_of_slot().sort().values.tolist() == list(range(6))


def test_the_identity_is_no_search_and_a_permutation_moves_the_experts():
    made = search(steps=0)
    with torch.no_grad():
        made.slots.copy_(torch.eye(6))
    plain = made.router(hidden(), context())
    same = made(hidden(), context(training=True))
    assert torch.equal(same.expert, plain.expert)
    assert torch.equal(same.weight, plain.weight)
    order = torch.tensor([2, 0, 1, 5, 3, 4])
    with torch.no_grad():
        made.slots.copy_(torch.eye(6)[order])
    moved = made(hidden(), context())
    assert torch.equal(moved.expert, order[plain.expert])
    assert torch.equal(moved.weight, plain.weight)
    # The record's scores stay those of the chosen experts.
    chosen = moved.scores.gather(1, moved.expert.view(T, 2))
    torch.testing.assert_close(chosen / chosen.sum(1, keepdim=True), moved.weight.view(T, 2))


def test_the_search_moves_experts_to_the_slots_that_want_them_and_then_freezes():
    made, x = search("softmax-raw", steps=60), hidden()
    order = torch.tensor([2, 0, 1, 5, 3, 4])
    wanted = order[made.router(x, context()).expert.view(T, 2)[:, 0]]

    def rewarded() -> float:
        routing = made(x, context())
        return float((routing.weight * (routing.expert == wanted[routing.token])).sum().detach())

    before = rewarded()
    optimizer = torch.optim.Adam([made.slots], lr=1e-4)
    for step in range(60):
        routing = made(x, context(training=True, step=step))
        assert PERMUTATION in routing.extra
        right = routing.expert == wanted[routing.token]
        loss = 1e-4 * permutation_entropy(routing) - (routing.weight * right).sum() / T
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # It need not be the best assignment: the temperature falls before all slots have settled.
    assert rewarded() > 1.5 * before
    routing = made(x, context(training=True, step=60))
    assert PERMUTATION not in routing.extra
    assert routing.top_k == 2
    assert permutation_entropy(routing) == 0


def test_the_base_router_learns_from_the_counts_of_its_own_slots():
    made = search("loss-free", steps=0)
    with torch.no_grad():
        made.slots.copy_(torch.eye(6).flip(0))
    made.after_step(torch.tensor([9.0, 1, 1, 1, 1, 1]))
    bias = made.router.terms._items[0].expert_bias
    assert bias.argmin() == 5


def test_bad_options_are_told():
    with pytest.raises(UserError, match="two experts"):
        build_router("comet", D, 1, 1)
    with pytest.raises(UserError, match="gamma"):
        router(4, gamma=0.0)
    with pytest.raises(UserError, match="did you mean"):
        build_router("local-search", D, 4, 2, base="softmax-ra")
