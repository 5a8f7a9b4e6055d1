"""`moekit sweep`: runs of a recipe, shared calibration, going on, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from moekit.core.record import RunRecord


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for domain in ("en", "de"):
        lines = [json.dumps({"text": f"{domain} text number {n} " * 3}) for n in range(8)]
        (folder / f"{domain}.jsonl").write_text("\n".join(lines))
    return folder


def recipe(path: Path, model: Path, text: Path, **changes: Any) -> Path:
    plain: dict[str, Any] = {
        "model": str(model),
        "seeds": [0, 1],
        "calibrate": {"data": [str(text)], "max_tokens": 120},
        "evaluate": {"data": [str(text)], "max_bytes": 60},
        "runs": [{"verb": "compress prune", "method": ["reap", "random"], "ratio": 0.5}],
    }
    path.write_text(yaml.safe_dump({**plain, **changes}))
    return path


def test_runs_are_done_compared_and_gone_on_with(moekit, tiny, text, tmp_path) -> None:
    file, out = recipe(tmp_path / "r.yaml", tiny, text), tmp_path / "out"
    done = moekit("sweep", file, "--out", out, "--json")
    assert done.code == 0, done.err
    rows = {row["settings"]["method"]: row for row in done.json["rows"]}
    assert set(rows) == {"reap", "random"}
    for row in rows.values():
        assert row["seeds"] == [0, 1]
        assert row["loss"]["deviation"] is not None
        assert set(row["domains"]) == {"en", "de"}
        assert row["increase"] is not None
    # All runs of a seed decided from the same statistics; weights are not kept.
    places = [p for p in out.iterdir() if p.name.startswith("prune")]
    assert len(places) == 4
    for place in places:
        record = RunRecord.load(place)
        assert f"calibration_seed-{record.seed}" in record.options["stats"]
        assert not list(place.glob("*.safetensors"))
    assert (out / "comparison.html").is_file()
    assert json.loads((out / "comparison.json").read_text())["rows"] == done.json["rows"]
    # A third method is added; the four runs before it are not done again.
    before = {place: (place / "record.json").stat().st_mtime_ns for place in places}
    runs = [{"verb": "compress prune", "method": ["reap", "random", "ean-sum"], "ratio": 0.5}]
    again = moekit("sweep", recipe(file, tiny, text, runs=runs), "--out", out)
    assert again.code == 0, again.err
    assert again.out.startswith("6 runs, 4 of them done before")
    assert {place: (place / "record.json").stat().st_mtime_ns for place in places} == before
    assert "ean-sum" in again.out


def test_a_refused_run_does_not_stop_the_others(moekit, tiny, text, tmp_path) -> None:
    runs = [{"verb": "compress prune", "method": "random", "ratio": [0.25, 0.9]}]
    file = recipe(tmp_path / "r.yaml", tiny, text, runs=runs, seeds=[0])
    done = moekit("sweep", file, "--out", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    assert len(done.json["rows"]) == 1
    (reason,) = done.json["refused"].values()
    assert "its router needs 2" in reason


def test_a_dry_run_lists_what_is_left(moekit, tiny, text, tmp_path) -> None:
    file = recipe(tmp_path / "r.yaml", tiny, text)
    done = moekit("sweep", file, "--out", tmp_path / "out", "--dry-run", "--json")
    assert done.json["runs"] == len(done.json["left"]) == 4
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"runs": [{"verb": "compress prun"}]}, "did you mean compress prune"),
        ({"runs": [{"verb": "compress prune", "seed": 1}]}, "the sweep's own"),
        ({"runs": [{"verb": "compress prune", "ratio": []}]}, "empty list"),
        ({"runs": [{"method": "reap"}]}, "not a mapping with a verb"),
        ({"runs": None}, "lacks 'runs'"),
        ({"seeds": [0, 0]}, "name one twice"),
        ({"seeds": [-1]}, "whole numbers from 0"),
        ({"evaluat": {}}, "Did you mean 'evaluate'"),
        ({"evaluate": {"data": []}}, "evaluate.data"),
        ({"calibrate": {"data": ["x"], "max_tokens": 0}}, "max_tokens is 0"),
    ],
    ids=lambda value: None if isinstance(value, str) else next(iter(value)),
)
def test_bad_recipes(refused, tiny, text, tmp_path, changes, words) -> None:
    file = recipe(tmp_path / "r.yaml", tiny, text, **changes)
    assert words in refused("sweep", file, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_output_of_another_sweep(moekit, refused, tiny, text, tmp_path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "other").write_text("")
    file = recipe(tmp_path / "r.yaml", tiny, text)
    assert "holds no sweep" in refused("sweep", file, "--out", out)
