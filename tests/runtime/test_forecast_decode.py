"""Forecast of decoding: the bytes of the model over the bandwidths of the machine."""

import pytest

import moekit
from moekit.core.errors import UserError
from moekit.core.pack import pack
from moekit.runtime import forecast_decode
from moekit.runtime.disk_speed import DiskSpeed, disk_speed, file_speed
from moekit.runtime.forecast_decode import memory_bandwidth, plan_decode
from moekit.runtime.store import ExpertStore
from tests.models import tiny_config, write_tiny_model

MEMORY, DISK = 20e9, 1e9


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("forecast") / "tiny")


@pytest.fixture(scope="module")
def packed(tiny):
    pack(tiny, tiny.with_name("packed"), codec="fp32")
    return tiny.with_name("packed")


@pytest.fixture
def machine(monkeypatch):
    monkeypatch.setattr(forecast_decode, "memory_bandwidth", lambda threads, nbytes: MEMORY)
    monkeypatch.setattr(forecast_decode, "disk_speed", lambda store: DiskSpeed(DISK))
    monkeypatch.setattr(forecast_decode, "file_speed", lambda path: DiskSpeed(DISK))


def test_an_encoded_resident_part_is_smaller(tiny, packed, machine, tmp_path):
    pack(tiny, tmp_path / "encoded", codec="fp32", resident_codec="int8")
    plain, encoded = (plan_decode(path, 10**9) for path in (packed, tmp_path / "encoded"))
    assert encoded.budget.needs.resident < plain.budget.needs.resident
    assert encoded.load.resident_bytes < plain.load.resident_bytes
    asked = plan_decode(packed, 10**9, resident_codec="int8")
    assert encoded.budget.needs.resident == asked.budget.needs.resident


def test_bytes_are_those_of_the_store(packed, machine):
    with ExpertStore.open(packed) as store:
        everything, record = store.expert_bytes, store.nbytes(0, 0)
        stored = sum(info.nbytes for info in store.resident_info().values())
        table = store.resident_info()["model.embed_tokens.weight"].nbytes
    plan = plan_decode(packed, 10**9, expert_cache=everything // 2)
    assert plan.budget.all_experts == everything
    # Where experts stay on disk, so does the embedding.
    assert plan.budget.needs.resident == stored - table
    assert plan_decode(packed, 10**9).budget.needs.resident == stored
    assert plan.load.expert_bytes == record
    # All but the embedding, of which a step reads one row.
    spec = moekit.MoESpec.from_dir(packed)
    assert plan.load.resident_bytes == stored - 4 * spec.vocab_size * spec.hidden_size
    assert plan.hit_rate == pytest.approx(0.5, abs=0.05)
    used = spec.top_k * len(spec.per_layer) * record
    assert plan.forecast.disk_seconds == pytest.approx(used * (1 - plan.hit_rate) / DISK)
    cached = plan.load.kv_bytes * plan.load.context
    assert plan.forecast.memory_seconds == pytest.approx(
        (used + plan.load.resident_bytes + cached) / MEMORY
    )


def test_hits_and_memory_make_it_faster(packed, machine):
    plan = plan_decode(packed, 10**9, expert_cache=30_000)
    rates = [plan.at(hit / 4).tokens_per_second for hit in range(5)]
    assert rates == sorted(rates)
    assert rates[0] < rates[-1]
    assert plan.forecast.tokens_per_second == plan.at(plan.hit_rate).tokens_per_second


def test_a_model_that_is_not_packed(tiny, machine):
    plan = plan_decode(tiny, 10**9)
    assert plan.budget.complete
    assert "fp32" in plan.notes[0]
    assert plan.to_dict()["tokens_per_second"] == plan.forecast.tokens_per_second


def test_graph_runner_is_slower_a_layer(packed, machine):
    native, graph = (plan_decode(packed, 10**9, runner=runner) for runner in ("native", "graph"))
    assert native.forecast.fixed_seconds < graph.forecast.fixed_seconds


def test_probe_stays_within_the_limit(packed, machine, monkeypatch):
    asked = []

    def probe(threads, nbytes):
        asked.append(nbytes)
        return MEMORY

    monkeypatch.setattr(forecast_decode, "memory_bandwidth", probe)
    monkeypatch.setattr(forecast_decode, "charged_memory", lambda: 400 * 2**20)
    plan_decode(packed, 500 * 2**20)
    plan_decode(packed, 10 * 2**30)
    assert asked == [50 * 2**20, 2**27]


def test_what_cannot_fit_is_refused(packed, machine):
    with pytest.raises(UserError, match="too little"):
        plan_decode(packed, 10**7)


def test_tied_embedding_is_read_as_the_head(tmp_path, machine):
    spec = moekit.MoESpec.from_config(tiny_config(tie_word_embeddings=True))
    total, read = forecast_decode._resident_bytes(spec, None)
    assert total == read
    coarse, _ = forecast_decode._resident_bytes(spec, "int8")
    assert coarse < total


def test_bandwidths_are_measured(packed):
    assert 1e7 < memory_bandwidth(1, 2**20, seconds=0.01) < 1e13
    with ExpertStore.open(packed) as store:
        found = disk_speed(store, 0.01)
    assert 1e4 < found.bandwidth < 1e12
    assert 0 <= found.latency < 10
    assert 1e3 < file_speed(packed / "experts.safetensors", 0.01).bandwidth < 1e12
