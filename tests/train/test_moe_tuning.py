"""MoE-tuning in stages: a dense run, its conversion, and experts and routers trained alone."""

import torch
import yaml
from safetensors.torch import load_file

from tests.train.conftest import ROOT

ON_CPU = ("--device", "cpu", "--threads", "1")


def test_only_experts_and_routers_learn(recipe, texts, tmp_path, moekit) -> None:
    dense, sparse, tuned = (tmp_path / name for name in ("dense", "sparse", "tuned"))
    done = moekit("train", recipe(model=None), "--data", texts, "--out", dense, *ON_CPU)
    assert done.code == 0, done.err
    method = "moe-tuning:layers=all"
    done = moekit("upcycle", dense, sparse, "--method", method, "--experts", 4, "--json")
    assert done.code == 0, done.err
    assert done.json["start"]["equal_to"] == "the source"
    last = yaml.safe_load((ROOT / "recipes" / "moe-tuning.yaml").read_text())
    short = yaml.safe_load(recipe().read_text())["train"]
    last["model"]["path"] = str(sparse)
    last["train"] = {**short, "freeze": last["train"]["freeze"], "tokens": 4 * 4 * 32}
    # Its rate would not move float32 weights in four steps of warming up.
    last["optim"] |= {"lr": 0.01, "warmup_steps": 1}
    (tmp_path / "last.yaml").write_text(yaml.safe_dump(last))
    done = moekit("train", tmp_path / "last.yaml", "--data", texts, "--out", tuned, *ON_CPU)
    assert done.code == 0, done.err
    model, made = (load_file(folder / "model.safetensors") for folder in (sparse, tuned))
    assert set(made) == set(model)
    learned = {name for name in made if not torch.equal(made[name], model[name])}
    wanted = ("mlp.gate.weight", "experts.gate_up_proj", "experts.down_proj")
    assert learned == {name for name in made if name.endswith(wanted)}
