"""Losses by language and their correlation with divergence, planted and null."""

import math

import numpy as np
import pytest
import torch

from moekit.analyze.language_divergence import language_divergence
from moekit.analyze.language_loss import language_loss
from moekit.core.errors import UserError

from .models import tiny_view, traced

LANGUAGES = ("en", "l1", "l2", "l3", "l4", "l5", "l6")


def parallel(view, shares, sentences=12, length=10, seed=0):
    """Language i takes a share of its tokens from the unlikely half, which routes elsewhere."""
    rng = np.random.default_rng(seed)
    samples = []
    for name, share in zip(LANGUAGES, shares, strict=True):
        for _ in range(sentences):
            rare = rng.random(length) < share
            ids = np.where(rare, rng.integers(160, 163, length), rng.integers(0, 3, length))
            samples.append((ids.tolist(), name))
    return traced(view, samples=samples)


def biased():
    """A model that finds the half above 160 unlikely, whatever came before."""
    view = tiny_view(num_hidden_layers=3, num_experts=8)
    head = torch.nn.Linear(32, 320)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.where(torch.arange(320) < 160, 4.0, 0.0))
    view.model.lm_head = head
    return view


def test_planted_correlation_is_found():
    """The more a language takes from the other half, the farther its routing and its loss."""
    view = biased()
    trace = parallel(view, [0, 0.15, 0.3, 0.45, 0.6, 0.8, 1])
    result = language_loss(trace, view, min_tokens=50)
    assert result.summary["unit"] == "bits a sentence"
    assert result.summary["correlation"] == pytest.approx(1)
    # Six languages in the one order of 720, or its reverse.
    assert result.summary["p"] < 0.02
    divergence = language_divergence(trace, min_tokens=50, permutations=100)
    assert [row[0] for row in result.rows] == divergence.column("layer")


def test_losses_by_hand():
    view = biased()
    trace = parallel(view, [0, 0, 0, 0, 0, 0, 1], sentences=10)
    loss = language_loss(trace, view, min_tokens=50).detail["loss"]
    total = math.log2(160 * math.exp(4) + 160)
    assert loss["en"] == pytest.approx(9 * (total - 4 / math.log(2)), rel=1e-5)
    assert loss["l6"] == pytest.approx(9 * total, rel=1e-5)


def test_equal_languages_do_not_correlate():
    """All languages alike: p is uniform."""
    view = biased()
    p = []
    for seed in range(4):
        trace = parallel(view, [0.5] * 7, sentences=6, seed=seed)
        p.append(language_loss(trace, view, min_tokens=50, permutations=200).summary["p"])
    # Binomial with 4 draws at 5 %: three or more happen once in two thousand.
    assert sum(value <= 0.05 for value in p) < 3


def test_few_languages_are_refused():
    view = tiny_view()
    samples = [([1, 2, 3, 4] * 15, name) for name in ("en", "de", "fr") for _ in range(4)]
    with pytest.raises(UserError, match="2 languages beside 'en': a correlation needs 4"):
        language_loss(traced(view, samples=samples), view)
