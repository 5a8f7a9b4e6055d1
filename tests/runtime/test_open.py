"""open_engine: packed models, packing on the fly, faults, and what is refused."""

import os
import time

import pytest
import torch

import moekit
from moekit.core.errors import UserError
from moekit.core.pack import pack
from moekit.runtime import pack_cache
from moekit.runtime.choose import choose_codec
from moekit.runtime.graph_runner import GraphRunner
from moekit.runtime.native_runner import NativeRunner
from moekit.runtime.store import StoreError
from tests.models import CONTEXT, tiny_config, write_tiny_model

PROMPTS = [[5, 9, 2], [7], [11, 3, 3, 8, 1, 250]]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    # The kernels are compiled into it too: those of the real cache are used.
    monkeypatch.setattr(pack_cache, "cache_directory", lambda: tmp_path / "cache")
    return tmp_path / "cache" / "packed"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("open") / "tiny")


@pytest.fixture(scope="module")
def packed(tiny):
    pack(tiny, tiny.with_name("packed"), codec="fp32")
    return tiny.with_name("packed")


def packs(cache):
    return sorted(path.name for path in cache.iterdir() if path.is_dir())


def test_packed_on_the_fly_once(tiny, cache):
    notes = []
    for _ in range(2):
        with moekit.open_engine(tiny, codec="fp32", note=notes.append) as engine:
            made = engine.generate(PROMPTS, 5)
    assert len(packs(cache)) == 1
    assert len(notes) == 1
    with moekit.open_engine(tiny) as engine:
        assert engine.generate(PROMPTS, 5) == made
    with moekit.open_engine(tiny, codec="bf16"):
        assert len(packs(cache)) == 2


def test_a_changed_source_is_packed_again(tmp_path, cache):
    path = write_tiny_model(tmp_path / "m")
    with moekit.open_engine(path, codec="fp32"):
        before = packs(cache)
    config = path / "config.json"
    os.utime(config, ns=(time.time_ns(), config.stat().st_mtime_ns + 10**9))
    with moekit.open_engine(path, codec="fp32"):
        assert len(packs(cache)) == 2
        assert set(before) < set(packs(cache))


def test_interrupted_packing_goes_on(tiny, cache):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        moekit.open_engine(tiny, codec="fp32", progress=stop)
    assert not [name for name in packs(cache) if not name.endswith(".partial")]
    with moekit.open_engine(tiny, codec="fp32") as engine:
        assert engine.generate(PROMPTS, 2)


def test_a_cache_that_cannot_be_written(tiny, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(pack_cache, "cache_directory", lambda: tmp_path / "file")
    with pytest.raises(UserError, match="MOEKIT_CACHE"):
        moekit.open_engine(tiny, codec="fp32")


def test_runners(packed, monkeypatch):
    with moekit.open_engine(packed) as engine:
        assert type(engine.runner) is NativeRunner
    with moekit.open_engine(packed, runner="graph") as engine:
        assert type(engine.runner) is GraphRunner
    monkeypatch.setattr("moekit.runtime.open_packed.library", lambda: None)
    with moekit.open_engine(packed) as engine:
        assert type(engine.runner) is GraphRunner
        assert "compiler" in engine.notes[0]


@pytest.mark.parametrize("runner", ["graph", "native"])
def test_damage_in_the_middle_ends_with_no_wrong_token(tiny, tmp_path, runner):
    path = tmp_path / "packed"
    pack(tiny, path, codec="fp32")
    with moekit.open_engine(path, runner=runner) as engine:
        expected = list(engine.stream(PROMPTS[0], 12))
    for file in path.glob("experts*.safetensors"):
        content = bytearray(file.read_bytes())
        # Every second record, so that the first tokens may still come.
        for start in range(len(content) - 100, len(content) // 2, -8192):
            content[start] ^= 1
        file.write_bytes(content)
    with moekit.open_engine(path, runner=runner) as engine:
        made = []
        with pytest.raises(StoreError, match="damaged"):
            made.extend(engine.stream(PROMPTS[0], 12))
        assert made == expected[: len(made)]


def test_memory_limit_holds_and_adds_up(packed):
    with moekit.open_engine(packed, memory="2GB", max_context=64) as engine:
        budget = engine.budget
        assert budget.limit == 2 * 10**9
        assert sum(n for _, n, _ in budget.rows()[:-1]) == budget.limit
        assert engine.max_context == 64
        assert engine.streams == 1
        made = engine.generate(PROMPTS, 5)
        assert engine.stats.bytes_read > 0
        assert engine.stats.peak_bytes < budget.limit
    with moekit.open_engine(packed) as engine:
        assert engine.generate(PROMPTS, 5) == made


def test_all_experts_stay_where_they_fit(packed):
    with moekit.open_engine(packed) as engine:
        assert engine.budget.complete
        engine.generate(PROMPTS, 5)
        first = engine.stats.misses
        engine.generate(PROMPTS, 5)
        assert engine.stats.misses == first <= 8


def test_the_rest_is_read_beside_the_first_steps(packed):
    with moekit.open_engine(packed) as engine:
        assert not engine.cache.complete
        made = engine.generate(PROMPTS, 40)
        for _ in range(1000):
            if engine.runner.observer is None:
                break
            engine.generate(PROMPTS, 2)
        # From here on whole steps are one call.
        assert engine.cache.complete
        assert engine.generate(PROMPTS, 40) == made


def test_sequences_beyond_the_streams_wait(packed):
    with moekit.open_engine(packed, streams=2, max_context=64) as engine:
        few = engine.generate(PROMPTS * 2, 6)
    with moekit.open_engine(packed, streams=6, max_context=64) as engine:
        assert engine.generate(PROMPTS * 2, 6) == few


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"memory": "10MB"}, "too little"),
        ({"memory": "lots"}, "not an amount"),
        ({"codec": "int4"}, "packed already"),
        ({"runner": "fast"}, "graph, native"),
        ({"policy": "belady"}, "simulation only"),
        ({"predictor": "nothing", "expert_cache": "30kB"}, "nothing"),
        ({"runner": "graph", "resident_codec": "int8"}, "native runner"),
    ],
)
def test_refusals(packed, options, words):
    with pytest.raises(UserError, match=words):
        moekit.open_engine(packed, **options)


def test_native_needs_a_packed_model(tiny):
    with pytest.raises(UserError, match="give a codec"):
        moekit.open_engine(tiny, runner="native")


def test_whole_model_beyond_memory_is_refused(tiny, monkeypatch):
    monkeypatch.setattr("moekit.runtime.open.available_memory", lambda: 10_000)
    with pytest.raises(UserError, match="memory='auto'"):
        moekit.open_engine(tiny)


def test_codec_is_the_widest_that_fits():
    spec = moekit.MoESpec.from_config(
        tiny_config(hidden_size=64, moe_intermediate_size=64, num_experts=64, dtype="bfloat16")
    )
    whole = 2 * spec.params.parts["routed"]
    assert choose_codec(spec, 2 * whole).codec == "bf16"
    assert choose_codec(spec, int(0.8 * whole)).codec == "int8"
    assert choose_codec(spec, whole // 2).codec == "int4"
    assert "lossy" in choose_codec(spec, whole // 2).reason
    narrow = moekit.MoESpec.from_config(tiny_config(moe_intermediate_size=24))
    assert choose_codec(narrow, 10).codec == "bf16"  # groups of 32 do not fit 24 columns


def test_closed_twice_and_after_an_error(packed):
    engine = moekit.open_engine(packed)
    engine.close()
    engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        engine.generate(PROMPTS, 1)


def test_resident_codec(packed):
    with moekit.open_engine(packed, resident_codec="int8") as engine:
        coarse = engine.budget.needs.resident
        assert torch.tensor(engine.generate(PROMPTS[:1], 3)).shape == (1, 6)
    with moekit.open_engine(packed) as engine:
        assert coarse < engine.budget.needs.resident


def test_more_context_than_the_model_has_is_refused(tiny, packed):
    message = f"max_context {CONTEXT + 1} is more than the model's {CONTEXT} tokens"
    for path, options in ((tiny, {}), (packed, {}), (tiny, {"memory": "auto"})):
        with pytest.raises(UserError, match=message):
            moekit.open_engine(path, max_context=CONTEXT + 1, **options)
