"""`moekit upcycle` into models that only moekit holds, and `moekit eval` on them."""

from tests.upcycle.dense_models import write_dense, write_texts


def test_an_ensemble_is_made_and_measured_beside_its_experts(moekit, tmp_path):
    base = write_dense(tmp_path / "base")
    other = write_dense(tmp_path / "other", like=base, seed=1)
    data = write_texts(tmp_path / "texts")
    made = moekit(
        "upcycle", base, tmp_path / "all", "--from", other, "--method", "branch-train-merge",
        "--json",
    )  # fmt: skip
    assert made.code == 0, made
    assert made.json["model_type"] == "moekit_ensemble"
    measured = {
        name: moekit("eval", tmp_path / name, data, "--max-bytes", 300, "--json").json
        for name in ("base", "other", "all")
    }
    assert set(measured["all"]["per_domain"]) == {"code", "prose"}
    best = min(measured[name]["total"]["nats"] for name in ("base", "other"))
    # Bayes: a prior of a half costs at most ln 2 nats a window, of which there are few.
    assert measured["all"]["total"]["nats"] <= best + 10


def test_a_model_routed_by_whole_prompts_is_not_scored(moekit, refused, tmp_path):
    base = write_dense(tmp_path / "base")
    other = write_dense(tmp_path / "other", like=base, seed=1)
    data = write_texts(tmp_path / "texts")
    method = "twin-merging:pool=sequence,epochs=1,examples=4,domains=prose"
    made = moekit(
        "upcycle", base, tmp_path / "twin", "--from", other, "--method", method, "--data", data
    )  # fmt: skip
    assert made.code == 0, made
    assert "eval refuses" in made.err
    assert "pool=prefix" in refused("eval", tmp_path / "twin", data)
