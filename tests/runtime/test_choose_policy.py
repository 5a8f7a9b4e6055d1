"""Choosing a policy: the trace is what the routers choose, and a clear winner is taken."""

import numpy as np
import pytest
import torch

import moekit
from moekit.core.pack import pack
from moekit.core.view import MoEView
from moekit.runtime import choose_policy as module
from moekit.runtime.choose_policy import CANDIDATES, choose_policy, routing_of
from tests.models import write_tiny_model


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    path = tmp_path_factory.mktemp("policy")
    pack(write_tiny_model(path / "tiny"), path / "packed", codec="fp32")
    return path / "packed"


@pytest.mark.parametrize("runner", ["graph", "native"])
def test_trace_is_what_the_routers_choose(packed, runner):
    ids = [5, 9, 2, 7, 250, 3]
    with moekit.open_engine(packed, runner=runner, expert_cache="30kB") as engine:
        steps = routing_of(engine, ids, 4)
    loaded = moekit.load(packed.with_name("tiny"))
    view = MoEView(loaded.model)
    with view.trace() as trace, torch.no_grad():
        loaded.model(torch.tensor([ids]))
    expected = np.stack([trace.layer(i).topk_ids.numpy() + 4 * i for i in (0, 1)], axis=1)
    assert np.array_equal(np.sort(steps.reshape(6, 2, 2)), np.sort(expected))


def test_default_stays_without_a_clear_winner(packed, monkeypatch):
    monkeypatch.setattr(module, "SECONDS", 1e9)
    with moekit.open_engine(packed, expert_cache="30kB") as engine:
        chosen = choose_policy(engine)
        assert set(chosen.hit_rates) == set(CANDIDATES)
        assert chosen.tokens == module.TOKENS == 64
        monkeypatch.setattr(module, "MARGIN", -1.0)
        best = choose_policy(engine)
        assert best.hit_rates[best.name] == max(chosen.hit_rates.values())
        monkeypatch.setattr(module, "MARGIN", 1.0)
        assert choose_policy(engine).name == "auto"
        monkeypatch.setattr(module, "SECONDS", 0.0)
        assert choose_policy(engine).tokens == 1


def test_memory_auto_chooses_and_says_so(packed, monkeypatch):
    monkeypatch.setattr(module, "MARGIN", -1.0)
    monkeypatch.setattr(module, "CANDIDATES", ("lru", "auto"))
    with moekit.open_engine(packed, "auto", expert_cache="30kB") as engine:
        assert any("on a trace of" in line for line in engine.notes)
        assert engine.stats.hits + engine.stats.misses == 0
        made = engine.generate([[5, 9, 2]], 5)
    with moekit.open_engine(packed, "auto") as engine:
        assert not any("on a trace of" in line for line in engine.notes)
        assert engine.generate([[5, 9, 2]], 5) == made
