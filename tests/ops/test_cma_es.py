"""CMA-ES: optima of simple functions, limits, and a search that is restored from its state."""

from __future__ import annotations

import json

import torch
from torch import Tensor

from moekit.ops.cma_es import CmaEs

TARGET = torch.tensor([0.7, -0.3, 1.2, 0.1], dtype=torch.float64)
# Conditioned so badly that a search without a covariance would take thousands of generations.
SCALES = torch.tensor([1.0, 30.0, 1.0, 30.0], dtype=torch.float64)


def quadratic(points: Tensor) -> Tensor:
    return ((points - TARGET) * SCALES).square().sum(1)


def run(search: CmaEs, generations: int) -> CmaEs:
    for _ in range(generations):
        points = search.ask()
        search.tell(points, quadratic(points))
    return search


def test_it_finds_the_optimum_of_a_quadratic() -> None:
    search = run(CmaEs(torch.zeros(4), 0.3), 150)
    torch.testing.assert_close(search.mean, TARGET, atol=1e-4, rtol=0)


def test_the_first_point_is_where_it_starts() -> None:
    assert torch.equal(CmaEs(TARGET, 0.3).ask()[0], TARGET)


def test_points_stay_within_the_limits() -> None:
    search = CmaEs(torch.zeros(4), 5.0, low=-0.5, high=0.5)
    for _ in range(20):
        points = search.ask()
        assert float(points.min()) >= -0.5
        assert float(points.max()) <= 0.5
        search.tell(points, quadratic(points))


def test_a_restored_search_goes_on_alike() -> None:
    whole = run(CmaEs(torch.zeros(4), 0.3, seed=3), 12)
    half = run(CmaEs(torch.zeros(4), 0.3, seed=3), 5)
    restored = CmaEs.from_dict(json.loads(json.dumps(half.to_dict())))
    assert torch.equal(run(restored, 7).mean, whole.mean)
