from __future__ import annotations

import json
import sys

import pytest

from moekit.core.stats import ExpertStats

pytest.importorskip("plotly")
WORDS = {
    "en": "the router chooses two experts for every token. ",
    "de": "der Router wählt zwei Experten. ",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for domain, text in WORDS.items():
        lines = [json.dumps({"text": f"{n} {text * 6}"}) for n in range(4)]
        (folder / f"web-{domain}.jsonl").write_text("\n".join(lines))
    return folder


def test_model_and_text_to_page(moekit, tiny, data, tmp_path):
    out = tmp_path / "a.html"
    done = moekit("report", tiny, "--data", data, "--out", out, "--memory", "1GB", "--json")
    assert done.code == 0, done.err
    (model,) = done.json["models"]
    sections = {c["section"]: c for c in model["conclusions"]}
    assert sections["cache"]["headline"] == "The whole model fits into 1.00 GB"
    assert {"load", "super", "redundancy", "pruning"} <= sections.keys()
    assert set(model["bits_per_byte"]) == {"web-de", "web-en"}
    page = out.read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert "class=passage" in page
    assert "Experten" in page
    assert not out.with_name("a.html.partial").exists()


def test_summary_without_page(moekit, tiny, data):
    done = moekit("report", tiny, "-d", data, "--max-tokens", 200)
    assert done.code == 0, done.err
    assert "2 MoE layers with 4 experts each" in done.out


def test_parts_of_one_model_and_two_models(moekit, tiny, data, tmp_path):
    for name in ("t", "u"):
        assert moekit("trace", tiny, data, "--out", tmp_path / name, "--seq-len", 32).code == 0
    assert moekit("profile", tiny, data, "--out", tmp_path / "s", "--seq-len", 32).code == 0
    assert ExpertStats.open(tmp_path / "s").domains == ["web-de", "web-en"]
    one = moekit("report", tiny, tmp_path / "t", tmp_path / "s", "--json").json
    assert len(one["models"]) == 1
    pruning = next(c for c in one["models"][0]["conclusions"] if c["section"] == "pruning")
    assert "size of the output" in pruning["detail"]
    assert "smaller" in pruning["detail"]
    alone = moekit("report", tmp_path / "s", "--json").json
    assert alone["models"][0]["tokens"] == one["models"][0]["tokens"]
    two = moekit("report", tmp_path / "t", tmp_path / "u", "--json").json
    assert [m["name"] for m in two["models"]] == ["t", "u"]
    assert two["changes"][0]["headline"].startswith("0 %")


def test_training_run(moekit, tmp_path):
    from tests.analyze.traces import make_trace, random_ids

    run = tmp_path / "run"
    (run / "probes").mkdir(parents=True)
    for step in (0, 10):
        ids = random_ids(64, 8, 2, 2, seed=step)
        make_trace(ids, 8, step=step).save(run / "probes" / f"step-{step:06d}")
    lines = [{"step": s, "loss": 9.0 / s, "routers": {"imbalance": [1.5, 2.0]}} for s in (1, 2, 3)]
    (run / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    done = moekit("report", run, "--out", tmp_path / "r.html", "--json")
    assert done.code == 0, done.err
    found = {c["section"]: c for c in done.json["models"][0]["conclusions"]}
    assert "9.00 to 3.00" in found["training"]["detail"]
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "Balance over training" in page
    assert "Routing over training" in page


def test_refusals(refused, moekit, tiny, data, tmp_path):
    (tmp_path / "nothing").mkdir()
    assert "holds no model, trace" in refused("report", tmp_path / "nothing")
    assert "give --data" in refused("report", tiny)
    assert "no such directory" in refused("report", tmp_path / "missing")
    assert "one HTML file" in refused("report", tiny, "-d", data, "-o", tmp_path / "a.txt")
    assert "third model" in refused("report", tiny, tiny, tiny)
    assert "not an amount of memory" in refused("report", tiny, "-d", data, "--memory", "much")
    (tmp_path / "empty.jsonl").write_text("")
    assert "no text found" in refused("report", tiny, "--data", tmp_path / "empty.jsonl")
    assert moekit("trace", tiny, data, "-o", tmp_path / "t").code == 0
    assert "needs a model" in refused("report", tmp_path / "t", "--data", data)
    assert "again" in refused("report", tiny, tmp_path / "t", "--data", data)
    assert "name it too" in refused("report", tmp_path / "t", "--memory", "1GB")
    (tmp_path / "page.html").touch()
    assert "exists already" in refused("report", tmp_path / "t", "-o", tmp_path / "page.html")
    (tmp_path / "t" / "chunk-00000.safetensors").write_bytes(b"no")
    assert "missing or truncated" in refused("report", tmp_path / "t")


def test_trace_of_another_model(refused, tiny, tmp_path):
    from tests.analyze.traces import make_trace, random_ids

    make_trace(random_ids(64, 8, 2, 2), 8).save(tmp_path / "other")
    message = refused("report", tiny, tmp_path / "other")
    assert "different models" in message


def test_missing_plotly_is_told_before_any_work(refused, tiny, data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    message = refused("report", tiny, "--data", data, "--out", tmp_path / "a.html")
    assert "moekit[report]" in message
