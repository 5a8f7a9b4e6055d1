"""Minimising a function of a few dozen numbers without gradients: CMA-ES, with its state as data.

Hansen's standard form (tutorial 1604.00772): rank-one and rank-mu updates of a full covariance,
cumulative step size. Shapes: n numbers, P points of a generation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moekit.core.seeds import generator


@dataclass
class CmaEs:
    """Points to try and their worth: `ask` [P, n], then `tell` their values, less is better.

    Points lie within `low` and `high` by clamping. Draws are keyed by `seed` and generation, so a
    search that is restored from `to_dict` goes on as it would have.
    """

    mean: Tensor
    sigma: float
    low: float = -math.inf
    high: float = math.inf
    seed: int = 0
    generation: int = 0
    covariance: Tensor = field(default_factory=lambda: torch.empty(0))
    path: Tensor = field(default_factory=lambda: torch.empty(0))
    path_sigma: Tensor = field(default_factory=lambda: torch.empty(0))

    def __post_init__(self) -> None:
        self.mean = self.mean.double()
        n = len(self.mean)
        if not self.covariance.numel():
            self.covariance = torch.eye(n, dtype=torch.float64)
            self.path = torch.zeros(n, dtype=torch.float64)
            self.path_sigma = torch.zeros(n, dtype=torch.float64)

    @property
    def population(self) -> int:
        """Points of a generation."""
        return 4 + int(3 * math.log(max(len(self.mean), 1)))

    def ask(self) -> Tensor:
        """The points [P, n] of the next generation, the first of them the mean in the first one."""
        draw = generator(self.seed, "cma-es", self.generation)
        steps = torch.randn(self.population, len(self.mean), generator=draw, dtype=torch.float64)
        values, vectors = torch.linalg.eigh(self.covariance)
        shape = vectors * values.clamp(min=1e-20).sqrt()
        points = self.mean + self.sigma * steps @ shape.T
        if self.generation == 0:
            points[0] = self.mean
        return points.clamp(self.low, self.high)

    def tell(self, points: Tensor, worth: Tensor) -> None:
        """Learn from the values [P] of the points that `ask` gave."""
        n, count = len(self.mean), len(points)
        half = count // 2
        weights = math.log(half + 0.5) - torch.arange(1, half + 1, dtype=torch.float64).log()
        weights = weights / weights.sum()
        effective = 1 / float(weights.square().sum())
        c_sigma = (effective + 2) / (n + effective + 5)
        damping = 1 + 2 * max(0.0, math.sqrt((effective - 1) / (n + 1)) - 1) + c_sigma
        c_path = (4 + effective / n) / (n + 4 + 2 * effective / n)
        c_one = 2 / ((n + 1.3) ** 2 + effective)
        c_mu = min(1 - c_one, 2 * (effective - 2 + 1 / effective) / ((n + 2) ** 2 + effective))
        expected = math.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n * n))

        best = points[worth.argsort()[:half]]
        steps = (best - self.mean) / self.sigma
        step = weights @ steps
        values, vectors = torch.linalg.eigh(self.covariance)
        whitened = vectors @ ((vectors.T @ step) / values.clamp(min=1e-20).sqrt())
        self.mean = self.mean + self.sigma * step
        self.generation += 1
        self.path_sigma = (1 - c_sigma) * self.path_sigma + math.sqrt(
            c_sigma * (2 - c_sigma) * effective
        ) * whitened
        length = float(self.path_sigma.norm())
        grown = math.sqrt(1 - (1 - c_sigma) ** (2 * self.generation))
        rising = length / grown < (1.4 + 2 / (n + 1)) * expected
        self.path = (1 - c_path) * self.path
        if rising:
            self.path = self.path + math.sqrt(c_path * (2 - c_path) * effective) * step
        # What a stalled path leaves out of the rank-one update is made good here.
        missing = 0.0 if rising else c_path * (2 - c_path)
        self.covariance = (
            (1 - c_one - c_mu + c_one * missing) * self.covariance
            + c_one * torch.outer(self.path, self.path)
            + c_mu * (steps.T * weights) @ steps
        )
        self.sigma *= math.exp(c_sigma / damping * (length / expected - 1))

    def to_dict(self) -> dict[str, Any]:
        """The state as plain data."""
        return {
            key: value.tolist() if isinstance(value, Tensor) else value
            for key, value in vars(self).items()
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> CmaEs:
        """The search that `to_dict` described."""
        restored: dict[str, Any] = {
            key: torch.tensor(value, dtype=torch.float64) if isinstance(value, list) else value
            for key, value in content.items()
        }
        return cls(**restored)
