"""The suite of `moekit bench`, its programs run in this process."""

import numpy as np
import pytest
import torch

from moekit.bench.budgets import Limit, routing, run_under
from moekit.bench.in_memory import check, run_in_memory
from moekit.bench.programs import STORED, TRANSFORMERS, Programs, find_programs
from moekit.bench.suite import run_suite
from moekit.bench.turns import DECODE, PREFILL, distance, ratios
from moekit.bench.worker_loop import answer
from moekit.bench.worker_moekit import Moekit
from moekit.bench.worker_transformers import Transformers
from moekit.core.errors import UserError
from moekit.core.pack import pack
from moekit.runtime import pack_cache
from tests.models import write_tiny_model

IDS = list(range(3, 51))
LIMIT = Limit(memory=3 * 10**9)
FLAGS = {"--no-prefetch": ("prefetch", False), "--record-routing": ("record", True)}


class Local:
    """A program in this process behind the interface of a worker."""

    opening = 0.0

    def __init__(self, program):
        self.program = program

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def call(self, op, **arguments):
        return answer(self.program, {"op": op, **arguments})

    def logits(self, ids):
        return self.program.logits(ids)


class LocalPrograms(Programs):
    def moekit(self, *options, path=None):
        given, left = {"record": False, "context": 64}, list(options)
        while left:
            name = left.pop(0)
            if name in FLAGS:
                given.__setitem__(*FLAGS[name])
            else:
                given[name.removeprefix("--").replace("-", "_")] = left.pop(0)
        given["context"] = int(given["context"])
        return Local(Moekit(str(path or self.packed), **given))

    def transformers(self, dtype):
        return Local(Transformers(str(self.model), dtype, "grouped_mm", 1))


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    tiny = write_tiny_model(tmp_path_factory.mktemp("suite") / "tiny")
    for codec in ("fp16", "bf16"):
        pack(tiny, tiny.with_name(codec), codec=codec)
    return tiny.parent


@pytest.fixture
def programs(paths):
    threads = torch.get_num_threads()
    found = LocalPrograms(paths / "tiny", paths / "fp16", "fp16", threads)
    found.starts = {
        found.name: found.moekit,
        STORED: lambda: found.moekit("--dtype", "bfloat16", path=paths / "bf16"),
        TRANSFORMERS: lambda: found.transformers("bfloat16"),
    }
    return found


def test_distance_and_ratios():
    exact = np.eye(3, dtype=np.float32)
    assert distance(exact * 1.5, exact) == 0.5
    fast = {"rounds": [{DECODE: 1.0, PREFILL: 100.0}, {DECODE: 2.0, PREFILL: 50.0}]}
    slow = {"rounds": [{DECODE: 3.0, PREFILL: 25.0}] * 2}
    found = ratios({"a": fast, "b": slow}, [("a", "b")])
    assert found == {"a / b": {"decode": 2.25, "prefill": 3.0}}


def test_every_program_is_checked_and_timed(programs):
    checked = check(programs, IDS)
    assert set(checked) == set(programs.starts)
    assert all(row["ok"] for row in checked.values()), checked
    found = run_in_memory(programs, checked, IDS, prompt=8, steps=4, rounds=2)
    assert set(found["programs"]) == set(programs.starts)
    assert all(row[DECODE] > 0 for row in found["programs"].values())
    assert f"{programs.name} / {TRANSFORMERS}" in found["ratios"]


def test_no_speed_where_the_logits_are_wrong(programs, paths, monkeypatch):
    original = Moekit.logits

    def wrong(self, ids):
        found = original(self, ids)
        return found + 1 if self._engine.runner.__class__.__name__ == "NativeRunner" else found

    monkeypatch.setattr(Moekit, "logits", wrong)
    found = run_suite(programs, IDS, limits=[LIMIT], rounds=1, note=lambda line: None)
    assert set(found["failed"]) == {programs.name, STORED}
    assert set(found["in_memory"]["programs"]) == {TRANSFORMERS}
    assert found["limits"] == []


def test_limits_have_hits_and_forecasts(programs):
    steps, checksum = routing(programs, IDS, LIMIT)
    layers, top_k = 2, steps.shape[2]
    assert steps.shape == (len(IDS) * layers, 1, top_k)
    found = run_under(programs, LIMIT, IDS, steps, checksum)
    assert found["ok"]
    assert found["expert_share"] == 1
    # Everything fits, so only first uses miss, for the engine and for the optimum.
    assert found["hit_rate"] == pytest.approx(found["belady"])
    assert found["tokens_per_second"] > 0
    assert found["forecast_ratio"] == found["forecast"] / found["tokens_per_second"]
    wrong = run_under(programs, LIMIT, IDS, steps, checksum + 1)
    assert not wrong["ok"]
    assert "tokens_per_second" not in wrong


def test_what_can_run_a_model(paths, tmp_path, monkeypatch):
    monkeypatch.setattr(pack_cache, "cache_directory", lambda: tmp_path)
    notes = []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    options = {"threads": 1, "peer_python": None, "note": notes.append}
    found = find_programs(paths / "tiny", "fp16", **options)
    assert set(found.starts) == {"moekit fp16", STORED, TRANSFORMERS}
    assert found.left_out[0].startswith("llama.cpp: no llama-cpp-python")
    packed = find_programs(paths / "fp16", "int4", **options)
    assert (list(packed.starts), packed.codec) == (["moekit fp16"], "fp16")
    with pytest.raises(UserError, match="has no llama-cpp-python"):
        find_programs(paths / "tiny", "fp16", **{**options, "peer_python": "/no/python"})
