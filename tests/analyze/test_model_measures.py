"""The measures that need the model, on families that store and route in different ways."""

import math

import pytest
import torch

from moekit.analyze import analyze
from moekit.core.view import MoEView
from tests.families.tiny import build_tiny

from .models import traced

# Interleaved and biased; dense first layer and correction bias; no gate and hybrid; adapter; group.
FAMILIES = ("gpt_oss", "deepseek_v3", "nemotron_h", "jetmoe", "llama4")
NAMES = ("super-experts", "redundancy", "coupling", "causal-importance")


@pytest.mark.parametrize("family", FAMILIES)
def test_measures_run_on(family):
    view = MoEView(build_tiny(family))
    generator = torch.Generator().manual_seed(0)
    samples = [(torch.randint(0, 100, (24,), generator=generator).tolist(), "a") for _ in range(3)]
    trace = traced(view, samples=samples)
    settings = {"causal-importance": {"budget": 72 * 5}, "redundancy": {"max_tokens": 48}}
    analysis = analyze(trace, view=view, settings=settings)
    assert set(NAMES) <= set(analysis.results), analysis.left_out
    found = {name: analysis.results[name].summary for name in NAMES}
    assert found["redundancy"]["near_duplicates"] == 0
    assert found["super-experts"]["super_experts"] == 0
    assert math.isfinite(found["coupling"]["contrast"])
    assert math.isfinite(found["causal-importance"]["loss"])
    changes = [abs(row[2]) for row in analysis.results["causal-importance"].rows]
    assert max(changes) > 0
