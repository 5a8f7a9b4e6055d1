"""`moekit upcycle` into models that only moekit holds, and `moekit eval` on them."""

import json

from tests.upcycle.dense_models import TEXTS, write_dense, write_texts

RECIPE = """
name: upcycled
model: {{path: {model}}}
tokenizer: {{path: {model}}}
optim: {{name: adamw, lr: 1.0e-3, embedding_lr: 1.0e-3, warmup_steps: 2}}
balance: {{rule: loss, coefficient: 0.01}}
train: {{tokens: 1024, seq_len: 64, batch_windows: 4, micro_windows: 4, eval_bytes: 200}}
"""


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


def test_a_model_of_attention_experts_is_trained_further(moekit, tmp_path):
    base = write_dense(tmp_path / "base")
    other = write_dense(tmp_path / "other", like=base, seed=1)
    model = tmp_path / "bam"
    assert moekit("upcycle", base, model, "--from", other, "--method", "bam").code == 0
    data = tmp_path / "data"
    data.mkdir()
    for domain, text in TEXTS.items():
        for part in ("train", "valid"):
            (data / f"{domain}.{part}.jsonl").write_text(json.dumps({"text": text}))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=model))
    trained = moekit("train", recipe, "--data", data, "--out", tmp_path / "trained")
    assert trained.code == 0, trained
    config = json.loads((tmp_path / "trained" / "config.json").read_text())
    assert config["part"] == {"kind": "attention-experts", "num_experts": 2, "shared_kv": False}
    measured = moekit("eval", tmp_path / "trained", data, "--max-bytes", 200, "--json")
    assert measured.code == 0, measured
