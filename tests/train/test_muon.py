"""Muon: the orthogonalisation, and that stacks are treated matrix by matrix."""

import pytest
import torch

from moekit.train.muon import Muon, orthogonalize


@pytest.mark.parametrize("shape", [(16, 16), (16, 40), (40, 16), (3, 16, 24)])
def test_singular_values_come_near_one(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalize(torch.randn(shape)).float())
    # The published coefficients trade accuracy for speed: the values settle in this band.
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_keeps_the_singular_vectors() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(8, 12)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    diagonal = left.T @ orthogonalize(matrix).float() @ right.T
    # bf16 products leave off-diagonal noise of a few percent.
    assert (diagonal - torch.diag(diagonal.diag())).abs().max() < 0.06


def test_a_bank_is_updated_like_its_matrices_one_by_one() -> None:
    torch.manual_seed(0)
    start, grad = torch.randn(3, 16, 8), torch.randn(3, 16, 8)
    bank = torch.nn.Parameter(start.clone())
    bank.grad = grad.clone()
    Muon([{"params": [bank], "split": 2}], lr=0.1, weight_decay=0.5).step()
    for expert in range(3):
        for half in (slice(0, 8), slice(8, 16)):
            single = torch.nn.Parameter(start[expert, half].clone())
            single.grad = grad[expert, half].clone()
            Muon([single], lr=0.1, weight_decay=0.5).step()
            # The batched bf16 products may round differently from single ones.
            torch.testing.assert_close(bank[expert, half], single, rtol=0, atol=2e-3)


def test_learns_a_linear_map_faster_than_it_starts() -> None:
    torch.manual_seed(0)
    target, inputs = torch.randn(8, 8), torch.randn(64, 8)
    weight = torch.nn.Parameter(torch.zeros(8, 8))
    optimizer = Muon([weight], lr=0.05)
    losses = []
    for _ in range(100):
        loss = (inputs @ (weight - target).T).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]
