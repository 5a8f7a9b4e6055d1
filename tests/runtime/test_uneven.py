"""Engines on packed models whose layers differ, and whose router rows share experts."""

import pytest
import torch
from transformers.utils import logging

import moekit
from moekit.core.layout import with_num_experts
from moekit.core.pack import pack
from moekit.core.plan import Action, ExpertPlan
from moekit.core.spec import spec_of
from moekit.runtime.unpack import load_packed
from tests.families.tiny import TINY, build_tiny

from .test_exactness import greedy, prompts

NEW = 10


@pytest.fixture(autouse=True)
def quiet():
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def uneven(layers):
    """One expert fewer of every layer than of the one before."""
    return ExpertPlan(
        {index: {e: Action(drop=True) for e in range(n + 1)} for n, index in enumerate(layers)}
    )


def aliased(layers):
    halves = {e: Action(group=1, weight=0.5) for e in (1, 3)}
    return ExpertPlan(dict.fromkeys(layers, halves), routers=dict.fromkeys(layers, "alias"))


def narrow(layers):
    widths = {index: 32 * (n % 2 + 1) for n, index in enumerate(layers)}
    return ExpertPlan({i: {e: Action(width=w) for e in range(16)} for i, w in widths.items()})


@pytest.mark.parametrize("runner", ["native", "graph"])
@pytest.mark.parametrize("make", [uneven, aliased, narrow])
@pytest.mark.parametrize("family", ["qwen3_moe", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_engine_and_decoded_model_give_the_same_tokens(tmp_path, family, make, runner):
    config = with_num_experts(TINY[family](), 16)
    for name in ("moe_intermediate_size", "intermediate_size"):
        if hasattr(config, name):
            setattr(config, name, 96)
    source = build_tiny(family, config=config)
    source.save_pretrained(tmp_path / "m")
    plan = make([layer.layer_index for layer in spec_of(source).per_layer])
    pack(tmp_path / "m", tmp_path / "packed", plan, codec="fp32")
    model = load_packed(tmp_path / "packed").model
    ids = prompts(2)
    with moekit.open_engine(tmp_path / "packed", max_context=64, runner=runner) as whole:
        half = whole.cache.nbytes // 2
    with moekit.open_engine(
        tmp_path / "packed", max_context=64, runner=runner, expert_cache=half
    ) as engine:
        assert torch.equal(engine.generate(ids, NEW), greedy(model, ids))
        assert engine.stats.misses
