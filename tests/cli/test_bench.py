"""moekit bench."""

import json

import pytest

from moekit.runtime import pack_cache


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(pack_cache, "cache_directory", lambda: tmp_path / "cache")


ROW = {
    "limit": 10**9,
    "expert_share": 0.5,
    "tokens_per_second": 12.3,
    "forecast": 11.0,
    "hit_rate": 0.8,
    "belady": 0.9,
    "bytes_read": 10**6,
    "peak_bytes": 10**9,
    "ok": True,
}
FOUND = {
    "check": {
        "moekit int4": {"distance": 0.1, "limit": 0.2, "top_1": 1.0, "ok": True},
        "llama.cpp q4_0": {"distance": 0.9, "limit": 0.2, "top_1": 0.1, "ok": False},
    },
    "in_memory": {
        "programs": {
            "moekit int4": {
                "decode_ms": 5.25,
                "prefill_tokens_per_second": 400.0,
            }
        },
        "ratios": {},
    },
    "left_out": [],
    "limits": [ROW],
    "failed": ["llama.cpp q4_0"],
}


def test_table_and_file(moekit, tiny, tmp_path, monkeypatch):
    asked = {}

    def suite(programs, ids, **options):
        asked.update(options, ids=len(ids), codec=programs.codec)
        return FOUND

    monkeypatch.setattr("moekit.bench.suite.run_suite", suite)
    out = tmp_path / "bench.json"
    arguments = ("--codec", "fp16", "--tokens", 20, "--memory", "2GB", "--memory", "3GB")
    done = moekit("bench", tiny, *arguments, "--out", out)
    assert done.code == 1
    assert [limit.memory for limit in asked["limits"]] == [3 * 10**9, 2 * 10**9]
    assert (asked["ids"], asked["rounds"], asked["codec"]) == (20, 3, "fp16")
    lines = [line.split() for line in done.out.splitlines()]
    assert ["moekit", "int4", "5.25", "400", "100.0%", "ok"] in lines
    # What failed its check has no speed.
    assert lines[2][:4] == ["llama.cpp", "q4_0", "-", "-"]
    assert "FAILED" in lines[2][5]
    assert json.loads(out.read_text())["metrics"]["limits"] == [ROW]
    assert "--out" in moekit("bench", tiny, "--out", out).err


def test_dry_run_forecasts_by_limit(moekit, tiny):
    result = moekit("bench", tiny, "--codec", "fp16", "--dry-run", "--json").json
    rates = [row["hit_rate"] for row in result["limits"]]
    assert rates == pytest.approx([0.9, 0.6, 0.35], abs=0.1)
    assert all(row["tokens_per_second"] > 0 for row in result["limits"])
    one = moekit("bench", tiny, "--codec", "fp16", "--dry-run", "--memory", "3GB")
    assert "3.00 GB" in one.out


@pytest.mark.slow
def test_the_whole_suite(moekit, tiny):
    result = moekit(
        "bench", tiny, "--codec", "fp16", "--tokens", 24, "--rounds", 1, "--memory", "3GB", "--json"
    ).json
    assert result["failed"] == []
    assert result["limits"][0]["tokens_per_second"] > 0
    assert "moekit fp16 / transformers bf16 grouped_mm" in result["in_memory"]["ratios"]


def test_a_python_without_the_peer_is_refused(refused, tiny):
    assert "llama-cpp-python" in refused("bench", tiny, "--peer-python", "/no/python")
