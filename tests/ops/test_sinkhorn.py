"""Marginals of the plan, its limits, and the bias that it amounts to."""

import pytest
import torch

from moekit.ops.sinkhorn import sinkhorn


def scores(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def test_rows_sum_to_one_and_columns_to_their_share() -> None:
    plan = sinkhorn(scores(24, 6), 0.5, iterations=500, tolerance=1e-6).plan
    # Rows are updated last, so only float32 separates them; columns are as close as asked for.
    torch.testing.assert_close(plan.sum(1), torch.ones(24))
    torch.testing.assert_close(plan.sum(0), torch.full((6,), 4.0), rtol=1e-5, atol=0)


def test_the_plan_is_a_row_softmax_after_a_bias_for_every_column() -> None:
    values = scores(10, 5)
    made = sinkhorn(values, 0.3, iterations=50)
    torch.testing.assert_close(made.plan, (values / 0.3 + made.columns).softmax(1))


def test_high_temperature_is_uniform_and_low_is_the_best_assignment() -> None:
    values = scores(5, 5)
    flat = sinkhorn(values, 1e6, iterations=20).plan
    torch.testing.assert_close(flat, torch.full((5, 5), 0.2), rtol=1e-4, atol=0)
    from scipy.optimize import linear_sum_assignment

    sharp = sinkhorn(values, 1e-2, iterations=5000).plan
    rows, columns = linear_sum_assignment(values.numpy(), maximize=True)
    # The runner-up is close here, so at this temperature it keeps a little of the mass.
    assert sharp[rows, columns].min() > 0.9


def test_the_gradient_passes_through_the_iterations() -> None:
    values = scores(4, 4).double().requires_grad_()
    torch.autograd.gradcheck(lambda v: sinkhorn(v, 0.7, iterations=8).plan, values)


def test_a_temperature_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="not positive"):
        sinkhorn(scores(3, 3), 0.0, iterations=1)
