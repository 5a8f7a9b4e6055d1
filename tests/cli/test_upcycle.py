"""`moekit upcycle` and what comes after it: profile, prune, run, sweep."""

from __future__ import annotations

import json

import pytest
import yaml

from moekit.core.record import RunRecord
from tests.upcycle.dense_models import dense_config, write_dense, write_texts


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base, two fine-tunes and texts of two domains."""
    root = tmp_path_factory.mktemp("models")
    base = write_dense(root / "base", dense_config("llama"))
    for seed, name in enumerate(("code", "prose"), start=1):
        write_dense(root / name, like=base, seed=seed)
    write_texts(root / "texts")
    return root


def test_writes_says_and_measures_step_0(moekit, models, tmp_path):
    done = moekit("upcycle", models / "base", tmp_path / "out", "--experts", 4, "--json")
    assert done.code == 0, done.err
    assert done.json["model_type"] == "mixtral"
    assert done.json["start"]["equal_to"] == "the source"
    assert done.json["start_measured"] < 1e-5
    told = moekit("upcycle", models / "base", tmp_path / "more", "--experts", 4)
    assert "At step 0 equal to the source" in told.out


def test_dry_run_writes_nothing(moekit, models, tmp_path):
    method = "dynamic-dino:experts=8"
    done = moekit("upcycle", models / "base", tmp_path / "out", "--method", method, "--dry-run")
    assert done.code == 0, done.err
    assert "would write" in done.out
    assert list(tmp_path.iterdir()) == []


def test_the_result_goes_through_profile_prune_and_run(moekit, models, tmp_path):
    out, stats, small = tmp_path / "out", tmp_path / "stats", tmp_path / "small"
    texts = models / "texts"
    for words in (
        ("upcycle", models / "base", out, "--experts", 4),
        ("profile", out, texts, "--out", stats, "--max-tokens", 60),
        ("compress", "prune", out, small, "--method", "reap", "--ratio", 0.5, "--stats", stats),
        ("run", small, "the router", "--max-new-tokens", 3),
    ):
        done = moekit(*words)
        assert done.code == 0, (words, done.err)
    config = json.loads((small / "config.json").read_text())
    assert (config["model_type"], config["num_local_experts"]) == ("mixtral", 2)


def test_a_recipe_of_experts_and_prompts(moekit, models, tmp_path):
    recipe = tmp_path / "moe.yaml"
    experts = [
        {"source_model": str(models / name), "positive_prompts": [prompt]}
        for name, prompt in (("code", "def route(x)"), ("prose", "the router chooses"))
    ]
    base = str(models / "base")
    recipe.write_text(yaml.safe_dump({"base_model": base, "experts": experts}))
    done = moekit("upcycle", recipe, tmp_path / "out", "--json")
    assert done.code == 0, done.err
    assert done.json["start"]["equal_to"] is None
    record = RunRecord.load(tmp_path / "out")
    assert record.options["method"] == "mergekit-moe"
    assert len(record.inputs) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--method", "spares"), "did you mean sparse"),
        (("--method", "sparse", "--experts", 0), "--experts"),
        (("--method", "btx"), "0 experts; give two models"),
        (("--method", "expert-upcycling"), "is dense"),
        (("--method", "sparse", "--from", "missing"), "missing: no such directory"),
        (("--to", "packed"), "no layout"),
        (("--eval", "missing.txt"), "no such file"),
    ],
    ids=lambda words: "-".join(map(str, words)) if isinstance(words, tuple) else "",
)
def test_refused(refused, models, tmp_path, words, message):
    assert message in refused("upcycle", models / "base", tmp_path / "out", *words)
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_over_merges_and_upcycles_has_the_plain_average(moekit, models, tmp_path):
    merge = {
        "merge_method": "ties",
        "base_model": str(models / "base"),
        "models": [
            {"model": str(models / name), "parameters": {"weight": 1, "density": 0.5}}
            for name in ("code", "prose")
        ],
    }
    (tmp_path / "ties.yaml").write_text(yaml.safe_dump(merge))
    sweep = {
        "model": str(models / "base"),
        "evaluate": {"data": [str(models / "texts")], "max_bytes": 80},
        "runs": [
            {"verb": "merge", "recipe": str(tmp_path / "ties.yaml")},
            {"verb": "upcycle", "method": ["sparse", "drop"], "experts": 4},
        ],
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    done = moekit("sweep", tmp_path / "sweep.yaml", "--out", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    assert done.json["refused"] == {}
    rows = {row["settings"]["method"]: row for row in done.json["rows"]}
    assert set(rows) == {"ties", "linear", "sparse", "drop"}
    assert all(set(row["domains"]) == {"code", "prose"} for row in rows.values())
    # The copies compute what the dense model does: only rounding may move the loss.
    assert rows["sparse"]["increase"]["mean"] == pytest.approx(0, abs=1e-4)
    assert rows["drop"]["increase"]["mean"] != pytest.approx(0, abs=1e-3)
    again = moekit("sweep", tmp_path / "sweep.yaml", "--out", tmp_path / "out")
    assert again.out.startswith("4 runs, 4 of them done before")
