"""Permutations are recovered, and nothing but an exact optimum is accepted."""

import itertools

import pytest
import torch

from moekit.ops.align import correlation, inverse, match, match_activations, match_weights


def test_match_is_the_best_of_all_permutations() -> None:
    similarity = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    found = match(similarity)
    place = torch.arange(6)
    best = max(
        itertools.permutations(range(6)), key=lambda order: float(similarity[place, order].sum())
    )
    assert tuple(found.tolist()) == best


def test_match_refuses_what_is_not_square() -> None:
    with pytest.raises(ValueError, match=r"\[2, 3\]"):
        match(torch.zeros(2, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_permuted_twin_is_recovered_exactly(dtype: torch.dtype) -> None:
    source = torch.Generator().manual_seed(1)
    neurons = torch.randn(32, 24, generator=source).to(dtype)
    shuffle = torch.randperm(32, generator=source)
    order = match_weights(neurons, neurons[shuffle])
    assert torch.equal(order, inverse(shuffle))
    assert torch.equal(neurons[shuffle][order], neurons)


def test_activations_are_matched_whatever_their_scale() -> None:
    source = torch.Generator().manual_seed(2)
    values = torch.randn(50, 16, generator=source)
    shuffle = torch.randperm(16, generator=source)
    other = values[:, shuffle] * torch.rand(16, generator=source).add(0.5)
    assert torch.equal(match_activations(values, other), inverse(shuffle))


def test_a_constant_column_correlates_with_nothing() -> None:
    values = torch.randn(20, 3, generator=torch.Generator().manual_seed(3))
    values[:, 1] = 0.3
    found = correlation(values, values)
    assert found[1].abs().max() == 0
    assert found[0, 0] == pytest.approx(1)
