"""How the page on pruning judges a claim."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from render_prune import verdict


def rows(*losses: float) -> dict[int, dict]:
    return {seed: {"seed": seed, "by_domain": {"a": loss}} for seed, loss in enumerate(losses)}


@pytest.mark.parametrize(
    ("better", "worse", "expected"),
    [
        (rows(1.0, 1.1, 1.2), rows(1.5, 1.2, 1.3), "**reproduced**"),
        (rows(1.5, 1.2, 1.3), rows(1.0, 1.1, 1.2), "**refuted**"),
        (rows(1.0, 1.3, 1.2), rows(1.5, 1.2, 1.3), "**cannot be seen**"),
        # One seed shows no spread.
        (rows(1.0), rows(1.5, 1.2), "**cannot be seen**"),
        ({}, rows(1.5), "not measured"),
    ],
)
def test_every_seed_must_agree(better, worse, expected):
    assert verdict(better, worse)[0] == expected


def test_gains_are_told_seed_by_seed():
    assert verdict(rows(1.0, 1.1), rows(1.5, 1.0))[1] == "+0.500, -0.100"
