"""The kernels of the fusers on planted experts: what must be exact is, and bounds hold."""

from __future__ import annotations

import pytest
import torch

from moekit.compress.condense.average import Member, average
from moekit.compress.condense.fisher import fisher_average
from moekit.compress.condense.least_squares import Target, refit_down, regression_mean
from moekit.compress.condense.low_rank_sparse import low_rank_sparse, split, stored_share
from moekit.compress.condense.recombine import recombine
from moekit.compress.condense.segments import owners
from moekit.compress.condense.subspace import subspace_average
from moekit.compress.condense.zip_neurons import zip_neurons
from moekit.core.expert_weights import ExpertWeights
from moekit.core.neurons import from_rows, neuron_rows
from moekit.core.new_experts import select_neurons
from moekit.ops.align import match_weights
from tests.compress.condense.planted import INNER, inputs, middle, noisy, random_expert, run


def equal(first: ExpertWeights, second: ExpertWeights) -> bool:
    mine, theirs = first.tensors(), second.tensors()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)


def shuffled(expert: ExpertWeights, seed: int = 3) -> ExpertWeights:
    order = torch.randperm(INNER, generator=torch.Generator().manual_seed(seed))
    return select_neurons(expert, order)


KINDS = [(True, True), (True, False), (False, True), (False, False)]


@pytest.mark.parametrize(("biased", "gated"), KINDS)
def test_rows_and_back(biased: bool, gated: bool) -> None:
    expert = random_expert(0, biased, gated)
    assert equal(from_rows(neuron_rows(expert), expert), expert)


@pytest.mark.parametrize(("biased", "gated"), KINDS)
def test_order_of_neurons_is_no_part_of_the_function(biased: bool, gated: bool) -> None:
    expert, hidden = random_expert(0, biased, gated), inputs()
    # Only the order of a sum of 10 float32 products differs.
    assert torch.allclose(run(shuffled(expert), hidden), run(expert, hidden), atol=1e-4)


def test_cut_to_all_neurons_is_the_expert() -> None:
    expert = random_expert(0, biased=True)
    assert equal(select_neurons(expert, torch.arange(INNER)), expert)


def test_neurons_of_weight_zero_can_go() -> None:
    expert = random_expert(0)
    expert.down[:, 4] = 0
    rest = select_neurons(expert, torch.tensor([n for n in range(INNER) if n != 4]))
    assert torch.allclose(run(rest, inputs()), run(expert, inputs()), atol=1e-5)


@pytest.mark.parametrize(("biased", "gated"), KINDS)
def test_permuted_twins_merge_without_loss_only_when_aligned(biased: bool, gated: bool) -> None:
    expert = random_expert(0, biased, gated)
    twin = shuffled(expert)
    order = match_weights(neuron_rows(expert), neuron_rows(twin))
    assert equal(select_neurons(twin, order), expert)
    half = [Member(0.5, expert), Member(0.5, select_neurons(twin, order))]
    assert equal(average(half), expert)
    lossy = average([Member(0.5, expert), Member(0.5, twin)])
    assert (run(lossy, inputs()) - run(expert, inputs())).norm() > 1


def fuse(name: str, members: list[Member]) -> ExpertWeights:
    hidden = inputs()
    if name == "average":
        return average(members)
    if name == "fisher":
        return fisher_average(members, [neuron_rows(m.expert).square() for m in members])
    if name == "subspace":
        return subspace_average(members, 1.0)
    if name == "zip":
        return zip_neurons(members, [middle(m.expert, hidden) for m in members])
    if name == "regression":
        return regression_mean(members, [hidden.T @ hidden for _ in members], 1e-2)
    start = average(members)
    targets = [
        Target(middle(start, hidden), run(m.expert, hidden), torch.ones(len(hidden)))
        for m in members
    ]
    return refit_down(start, targets, 1e-2)


FUSERS = ["average", "fisher", "subspace", "zip", "regression", "refit"]


@pytest.mark.parametrize("name", ["average", "fisher", "subspace", "zip", "regression"])
def test_a_lone_expert_stays_bit_for_bit(name: str) -> None:
    expert = random_expert(0, biased=True)
    assert equal(fuse(name, [Member(1.0, expert)]), expert)


@pytest.mark.parametrize("name", FUSERS)
def test_equal_experts_fuse_to_themselves(name: str) -> None:
    expert = random_expert(0)
    fused = fuse(name, [Member(0.25, expert), Member(0.75, expert)])
    # float64 inside, one rounding to float32 of weights near 1, times 12 to 120 of them.
    assert torch.allclose(run(fused, inputs()), run(expert, inputs()), atol=2e-4)


def test_zip_finds_permuted_twins_by_itself() -> None:
    expert = random_expert(0)
    fused = fuse("zip", [Member(0.5, expert), Member(0.5, shuffled(expert))])
    assert torch.allclose(run(fused, inputs()), run(expert, inputs()), atol=2e-4)


def test_fisher_follows_the_informed_entry_by_entry() -> None:
    first, second = random_expert(0), random_expert(1)
    rows = neuron_rows(first)
    ones = torch.ones_like(rows)
    plain = fisher_average([Member(0.5, first), Member(0.5, second)], [ones, ones])
    both = average([Member(0.5, first), Member(0.5, second)])
    assert torch.allclose(neuron_rows(plain), neuron_rows(both), atol=1e-6)
    sure = ones.clone()
    sure[2] = 1e9
    led = fisher_average([Member(0.5, first), Member(0.5, second)], [sure, ones])
    assert torch.allclose(neuron_rows(led)[2], rows[2], atol=1e-5)
    assert torch.allclose(neuron_rows(led)[3], neuron_rows(both)[3], atol=1e-5)


def test_fisher_without_any_token_is_the_average() -> None:
    members = [Member(0.3, random_expert(0)), Member(0.7, random_expert(1))]
    none = torch.zeros_like(neuron_rows(members[0].expert))
    fused = fisher_average(members, [none, none])
    assert torch.allclose(neuron_rows(fused), neuron_rows(average(members)), atol=1e-6)


def test_subspace_projects_the_average() -> None:
    members = [Member(0.5, random_expert(0)), Member(0.5, random_expert(1))]
    fused, mean = subspace_average(members, 0.5), average(members)
    for name in ("gate", "up", "down"):
        made, start = getattr(fused, name).double(), getattr(mean, name).double()
        assert int(torch.linalg.matrix_rank(made, rtol=1e-5)) == round(len(start) * 0.5)
        # A projection: what was taken away is at right angles to what stayed.
        assert float((made * (start - made)).sum()) == pytest.approx(0, abs=1e-4)


def test_regression_mean_is_where_the_gradient_vanishes() -> None:
    members = [Member(0.4, random_expert(0)), Member(0.6, random_expert(1))]
    hidden = [inputs(1)[:, :] * torch.linspace(0.1, 2, 12), inputs(2)]
    moments = [h.double().T @ h.double() for h in hidden]
    fused = regression_mean(members, moments, 1e-9)
    gradient = sum(
        m.share * (fused.up.double() - m.expert.up.double()) @ c
        for m, c in zip(members, moments, strict=True)
    )
    scale = sum(m.share * m.expert.up.double() @ c for m, c in zip(members, moments, strict=True))
    # The ridge and the rounding to float32 leave this much.
    assert gradient.norm() < 1e-5 * scale.norm()


@pytest.mark.parametrize("ridge", [1e-6, 1e-2, 1.0])
def test_refit_is_never_worse_than_its_start(ridge: float) -> None:
    first, second = random_expert(0), noisy(random_expert(0), 0.5, 9)
    start = average([Member(0.5, first), Member(0.5, second)])
    gates = torch.rand(400, generator=torch.Generator().manual_seed(4))
    targets = []
    for number, expert in enumerate((first, second)):
        hidden = inputs(20 + number)
        targets.append(Target(middle(start, hidden), run(expert, hidden), gates))
    fused = refit_down(start, targets, ridge)

    def loss(expert: ExpertWeights) -> float:
        return sum(
            float((((t.middle @ expert.down.T) - t.output) * t.gate[:, None]).square().sum())
            for t in targets
        )

    assert loss(fused) <= loss(start)
    if ridge < 1:
        assert loss(fused) < 0.99 * loss(start)


def test_refit_without_tokens_keeps_the_start() -> None:
    start = random_expert(0)
    assert refit_down(start, [], 1e-2).down is start.down


@pytest.mark.parametrize("rank", [1, 4, 10])
def test_low_rank_plus_residue_is_the_matrix(rank: int) -> None:
    matrix = random_expert(0).gate
    factors, residue = split(matrix, rank)
    assert torch.allclose(factors.product() + residue, matrix.double(), atol=1e-12)
    # Singular values shared evenly: columns of U are as long as rows of V.
    assert torch.allclose(factors.left.norm(dim=0), factors.right.norm(dim=1))


def test_residue_kept_whole_is_the_expert_and_kept_rows_are_exact() -> None:
    expert = random_expert(0)
    assert low_rank_sparse(expert, 2, 1.0) is expert
    fused = low_rank_sparse(expert, 2, 0.5)
    exact = sum(
        int((getattr(fused, name) - getattr(expert, name)).abs().amax(1).lt(1e-6).sum())
        for name in ("gate", "up", "down")
    )
    assert exact == round(0.5 * (INNER + INNER + 12))
    errors = [
        float((neuron_rows(low_rank_sparse(expert, 2, keep)) - neuron_rows(expert)).norm())
        for keep in (0.0, 0.3, 0.6, 0.9)
    ]
    assert errors == sorted(errors, reverse=True)


def test_information_decides_which_rows_stay() -> None:
    expert = random_expert(0)
    zeros = {name: torch.zeros_like(part) for name, part in expert.tensors().items()}
    zeros["up"][3] = 1
    fused = low_rank_sparse(expert, 1, 1 / 32, ExpertWeights(**zeros))
    assert torch.allclose(fused.up[3], expert.up[3], atol=1e-6)


def test_stored_share() -> None:
    assert stored_share(100, 50, 10, 0.1) == pytest.approx((10 * 150 + 500) / 5000)


def test_recombining_with_a_dropped_copy_keeps_the_function() -> None:
    expert = random_expert(0)
    twin = shuffled(expert)
    found = owners([0], [1], [expert, twin].__getitem__, 0.6, False)[1]
    assert (found.expert == 0).all()
    received = neuron_rows(twin)[found.expert == 0]
    fused = recombine(expert, 2.0, received, torch.full((INNER,), 1.0), 0.6)
    assert torch.allclose(run(fused, inputs()), run(expert, inputs()), atol=2e-4)


def test_recombining_with_nothing_is_nothing() -> None:
    expert = random_expert(0)
    assert recombine(expert, 2.0, torch.empty(0, 36), torch.empty(0), 0.6) is expert


@pytest.mark.parametrize(("biased", "gated"), KINDS)
def test_recombined_expert_has_its_old_shape(biased: bool, gated: bool) -> None:
    expert, other = random_expert(0, biased, gated), random_expert(1, biased, gated)
    fused = recombine(expert, 1.0, neuron_rows(other)[:7], torch.full((7,), 0.5), 0.6)
    assert {n: p.shape for n, p in fused.tensors().items()} == {
        n: p.shape for n, p in expert.tensors().items()
    }
    assert all(part.isfinite().all() for part in fused.tensors().values())


def test_recombining_reconstructs_prototype_neurons_better_than_dropping() -> None:
    """Neurons that are noisy copies of prototypes: the mean of two is nearer than one alone."""
    clean = random_expert(0)
    kept, dropped = noisy(clean, 0.3, 1), shuffled(noisy(clean, 0.3, 2))
    fused = recombine(kept, 1.0, neuron_rows(dropped), torch.ones(INNER), 0.6)
    target = neuron_rows(clean)

    def error(expert: ExpertWeights) -> float:
        rows = neuron_rows(expert)
        order = match_weights(target, rows)
        return float((rows[order] - target).square().sum())

    assert error(fused) < error(kept)
