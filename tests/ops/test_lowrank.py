"""Truncated SVD loses exactly the tail; whitened, it loses least of the outputs."""

import pytest
import torch

from moekit.ops.lowrank import rank_for, row_space, truncated, whitener


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_what_is_lost_is_the_tail_of_the_singular_values() -> None:
    matrix = random(12, 20).double()
    tail = torch.linalg.svdvals(matrix)[5:].square().sum()
    space = row_space(matrix, 5)
    # Both sides are float64 sums of the same numbers, so rounding alone separates them.
    assert float((matrix - space.factors(matrix).product()).square().sum()) == pytest.approx(
        float(tail), rel=1e-10
    )
    assert space.lost == pytest.approx(float(tail), rel=1e-10)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_full_rank_gives_the_matrix_back(shape: tuple[int, int]) -> None:
    matrix = random(*shape)
    factors = truncated(matrix, 12)
    # float64 inside, float32 in: the error is far below float32's own.
    assert (factors.product() - matrix).abs().max() < 1e-12


def test_whitened_loses_less_of_the_outputs_and_more_of_the_weights() -> None:
    matrix = random(16, 24)
    inputs = random(200, 24, seed=1) * torch.logspace(0, -3, 24)
    white = whitener(inputs.T @ inputs)
    plain, aware = truncated(matrix, 6).product(), truncated(matrix, 6, white).product()

    def outputs(found: torch.Tensor) -> float:
        return float((inputs.double() @ (found - matrix).T).square().sum())

    assert outputs(aware) < 0.5 * outputs(plain)
    assert (aware - matrix).norm() > (plain - matrix).norm()


def test_whitening_with_inputs_all_alike_changes_nothing() -> None:
    matrix = random(16, 24)
    aware = truncated(matrix, 6, whitener(3 * torch.eye(24))).product()
    assert torch.allclose(aware, truncated(matrix, 6).product(), atol=1e-10)


def test_no_tokens_is_the_plain_one() -> None:
    matrix = random(16, 24)
    aware = truncated(matrix, 6, whitener(torch.zeros(24, 24))).product()
    assert torch.equal(aware, truncated(matrix, 6).product())


def test_whitener_of_few_tokens_is_finite_and_inverts() -> None:
    inputs = random(3, 24)
    white = whitener(inputs.T @ inputs)
    # The ridge bounds the condition number at 1e3 or so, of float64's 1e16.
    assert torch.allclose(white.root @ white.inverse, torch.eye(24).double(), atol=1e-8)


@pytest.mark.parametrize(("keep", "rank"), [(0.5, 1), (0.8, 2), (0.81, 3), (1.0, 4), (0.0, 1)])
def test_rank_for_a_share(keep: float, rank: int) -> None:
    assert rank_for(torch.tensor([5.0, 3.0, 1.0, 1.0]).double(), keep) == rank


def test_rank_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="rank 0"):
        row_space(random(4, 4), 0)
