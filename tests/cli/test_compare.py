"""`moekit compare`: what it prints, writes and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("plotly")


@pytest.fixture(scope="module")
def results(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as two conversions left it: whole, and with half of its experts."""
    from moekit.core.convert import convert
    from moekit.core.plan import Action, ExpertPlan
    from moekit.core.spec import MoESpec

    root = tmp_path_factory.mktemp("compare")
    layers = MoESpec.from_dir(tiny).per_layer
    dropped = {
        layer.layer_index: {e: Action(drop=True) for e in range(layer.num_experts // 2)}
        for layer in layers
    }
    convert(tiny, root / "whole")
    convert(tiny, root / "half", plan=ExpertPlan(dropped))
    return root


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "prose.txt").write_text("some words to measure on, not many of them")
    (tmp_path / "code.txt").write_text("x = [i for i in range(9)]")
    return tmp_path


def test_results_are_measured_and_drawn(moekit, tiny, results, text, tmp_path) -> None:
    page = tmp_path / "page.html"
    data = ("--data", text / "prose.txt", "--data", text / "code.txt")
    done = moekit("compare", results, *data, "--before", tiny, "--out", page, "--json")
    assert done.code == 0, done.err
    rows = done.json["rows"]
    assert len(rows) == 2
    assert rows[0]["size"] < rows[1]["size"] == done.json["size_before"]
    assert set(rows[0]["domains"]) == {"prose", "code"}
    # One of the two is the source itself, written again.
    assert rows[1]["increase"]["mean"] == 0
    shown = page.read_text()
    assert "plan" in shown
    assert "Pareto" in shown
    lines = moekit("compare", results, *data).out.splitlines()
    assert lines[0].split()[:5] == ["what", "size", "bits", "per", "byte"]


def test_what_records_say_is_not_measured_again(moekit, results, refused) -> None:
    assert "give --data" in refused("compare", results)
    from moekit.evaluate.quality import QUALITY, Quality

    for place, name in enumerate(("whole", "half")):
        file = results / name / "record.json"
        record = json.loads(file.read_text())
        record["metrics"][QUALITY] = Quality({"prose": 1.0 + place}, "t", 8, 4).to_dict()
        file.write_text(json.dumps(record))
    done = moekit("compare", results / "whole", results / "half", "--json")
    assert [row["loss"]["mean"] for row in done.json["rows"]] == [2.0, 1.0]
    assert all(row["on_front"] for row in done.json["rows"])


def test_bad_requests(refused, results, tiny, tmp_path) -> None:
    assert "no directory" in refused("compare", tmp_path / "missing")
    assert "record.json" in refused("compare", tiny)
    assert "HTML" in refused("compare", results, "--out", tmp_path / "page.png")
    assert "--data" in refused("compare", results, "--max-bytes", 10)
    assert "--data" in refused("compare", results, "--before", tiny)
