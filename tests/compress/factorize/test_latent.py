"""Latent experts lose the tail of the singular values, nothing where they need not, and no more."""

from __future__ import annotations

import pytest
import torch

from moekit.compress.factorize.latent import (
    Shape,
    group_factors,
    rank_for_ratio,
    stored_numbers,
)
from moekit.core.expert_weights import ExpertWeights
from moekit.ops.lowrank import whitener
from tests.compress.condense.planted import INNER, WIDTH, inputs, middle, random_expert, run

GROUP = 3


def group(gated: bool = True) -> list[ExpertWeights]:
    return [random_expert(seed, gated=gated) for seed in range(GROUP)]


def squares(before: list[ExpertWeights], after: list[ExpertWeights], name: str) -> float:
    pairs = zip(before, after, strict=True)
    return sum(
        float((getattr(a, name) - getattr(b, name)).double().square().sum()) for a, b in pairs
    )


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("rank", [1, 4, 8])
def test_error_is_the_tail_of_the_singular_values(rank: int, gated: bool) -> None:
    experts = group(gated)
    factors = group_factors(experts, Shape(rank, "shared"))
    made = [factors.expand(expert) for expert in experts]
    for name in ("gate", "up", "down"):
        if getattr(experts[0], name) is None:
            continue
        stacked = torch.cat(
            [e.down.T if name == "down" else getattr(e, name) for e in experts]
        ).double()
        tail = float(torch.linalg.svdvals(stacked)[rank:].square().sum())
        # The matrices are rounded to float32 once.
        assert squares(experts, made, name) == pytest.approx(tail, rel=1e-6)
        assert factors.spaces[name].lost == pytest.approx(tail, rel=1e-9)


@pytest.mark.parametrize("down", ["whole", "private", "shared"])
def test_full_rank_is_the_expert_bit_for_bit(down: str) -> None:
    experts = group()
    factors = group_factors(experts, Shape(max(INNER * GROUP, WIDTH), down))
    for expert in experts:
        made = factors.expand(expert)
        assert all(torch.equal(getattr(made, n), p) for n, p in expert.tensors().items())


def test_a_group_of_one_at_full_rank_is_exact() -> None:
    expert = random_expert(0)
    made = group_factors([expert], Shape(min(INNER, WIDTH), "private")).expand(expert)
    assert all(torch.equal(getattr(made, n), p) for n, p in expert.tensors().items())


def test_planted_shared_rows_are_found() -> None:
    """Experts whose rows lie in one space of 5 dimensions, and whose columns in another."""
    source = torch.Generator().manual_seed(0)
    rows = {name: torch.randn(5, WIDTH, generator=source) for name in ("gate", "up")}
    columns = torch.randn(WIDTH, 5, generator=source)
    experts = [
        ExpertWeights(
            torch.randn(INNER, 5, generator=source) @ rows["gate"],
            torch.randn(INNER, 5, generator=source) @ rows["up"],
            columns @ torch.randn(5, INNER, generator=source),
        )
        for _ in range(GROUP)
    ]
    factors = group_factors(experts, Shape(5, "shared"))
    for expert in experts:
        difference = run(factors.expand(expert), inputs()) - run(expert, inputs())
        assert difference.norm() < 1e-5 * run(expert, inputs()).norm()


def test_fused_evaluation_equals_the_expanded_expert() -> None:
    """Inputs projected once for the group, as an implementation with factors would."""
    experts, hidden = group(), inputs()
    factors = group_factors(experts, Shape(6, "shared"))
    latent = {name: hidden.double() @ factors.spaces[name].decode.T for name in ("gate", "up")}
    for expert in experts:
        private = {
            name: factors.spaces[name].factors(getattr(expert, name)).left for name in latent
        }
        inner = torch.nn.functional.silu(latent["gate"] @ private["gate"].T) * (
            latent["up"] @ private["up"].T
        )
        down = factors.spaces["down"]
        fused = inner @ (down.encode.T @ expert.down.double()).T @ down.decode
        expanded = run(factors.expand(expert), hidden)
        assert torch.allclose(fused.float(), expanded, atol=1e-3, rtol=1e-4)


def test_whitened_loses_less_of_the_outputs() -> None:
    experts = group()
    hidden = inputs() * torch.logspace(0, -2, WIDTH)
    white = whitener(hidden.T @ hidden)
    middles = [middle(expert, hidden) for expert in experts]
    white_down = [whitener(m.T @ m) for m in middles]
    plain = group_factors(experts, Shape(5, "shared"))
    aware = group_factors(experts, Shape(5, "shared"), white, white_down)
    for name in ("gate", "up"):
        errors = [
            sum(
                float((hidden @ (getattr(f.expand(e), name) - getattr(e, name)).T).square().sum())
                for e in experts
            )
            for f in (plain, aware)
        ]
        assert errors[1] < errors[0]
    errors = [
        sum(
            float((m @ (f.expand(e).down - e.down).T).square().sum())
            for e, m in zip(experts, middles, strict=True)
        )
        for f in (plain, aware)
    ]
    assert errors[1] < errors[0]


def test_first_phase_lowers_every_matrix() -> None:
    """With rank 2 of every matrix first, 3 experts of rank 2 fit into 6 dimensions."""
    experts = group()
    factors = group_factors(experts, Shape(6, "shared", first_rank=2))
    for name in ("gate", "up", "down"):
        assert factors.spaces[name].lost < 1e-9 * factors.spaces[name].total


@pytest.mark.parametrize("down", ["whole", "private", "shared"])
@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5])
def test_rank_for_a_ratio_is_the_largest_that_fits(down: str, ratio: float) -> None:
    sizes = (256, 128, 8, True)
    rank = rank_for_ratio(*sizes, down, ratio)
    limit = (1 - ratio) * 3 * 8 * 256 * 128
    assert rank is not None
    assert stored_numbers(*sizes, Shape(rank, down)) <= limit
    assert stored_numbers(*sizes, Shape(rank + 1, down)) > limit


def test_a_ratio_that_down_alone_exceeds_has_no_rank() -> None:
    assert rank_for_ratio(256, 128, 8, True, "whole", 0.75) is None


def test_numbers_of_the_paper() -> None:
    """q f d becomes q f m + m d for each of gate and up (v1)."""
    assert stored_numbers(20, 10, 4, True, Shape(3, "whole")) == 2 * (4 * 10 * 3 + 3 * 20) + 800
