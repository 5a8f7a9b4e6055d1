"""moekit compress plan, and what lies beside a model that a plan made."""

import json

import pytest
from safetensors import safe_open

from moekit.core.load import load
from moekit.core.plan import Action, ExpertPlan
from tests.export.gguf_check import save
from tests.models import write_tiny_model


@pytest.fixture
def tiny(tmp_path):
    return write_tiny_model(tmp_path / "tiny")


def saved(path, **actions):
    ExpertPlan({i: {int(e[1:]): a for e, a in actions.items()} for i in (0, 1)}).save(path)
    return path


def test_plans_are_joined(moekit, tiny, tmp_path):
    one = saved(tmp_path / "one.json", e1=Action(drop=True))
    two = saved(tmp_path / "two.json", e2=Action(bits=4), e0=Action(protect=True))
    out = tmp_path / "both.json"
    done = moekit("compress", "plan", tiny, one, two, "--out", out, "--json").json
    assert done["experts"] == {"0": 3, "1": 3}
    assert done["uses"] == ["drop", "bits", "protect"]
    joined = ExpertPlan.load(out)
    assert joined.action(0, 3).bits == 4
    assert joined.model.model_type == "qwen3_moe"
    shown = moekit("compress", "plan", tiny, out).out
    assert "qwen3_moe, 2 MoE layers, 4 experts, top-2" in shown


def test_what_cannot_be_applied(refused, tiny, tmp_path):
    wrong = saved(tmp_path / "wrong.json", e7=Action(drop=True))
    assert "experts 0 to 3" in refused("compress", "plan", tiny, wrong)
    three = {f"e{i}": Action(drop=True) for i in range(3)}
    many = saved(tmp_path / "many.json", **three)
    assert "leaves 1 of 4 experts" in refused("compress", "plan", tiny, many)
    first = saved(tmp_path / "first.json", e0=Action(protect=True))
    second = saved(tmp_path / "second.json", e0=Action(drop=True))
    assert "that the first plan protects" in refused("compress", "plan", tiny, first, second)
    assert "cannot be read" in refused("compress", "plan", tiny, tmp_path / "none.json")
    assert "exists already" in refused("compress", "plan", tiny, first, "--out", second)


def test_card_and_plan_lie_beside_the_model(moekit, tiny, tmp_path):
    (tiny / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    plan = saved(tmp_path / "plan.json", e1=Action(drop=True))
    out = tmp_path / "out"
    moekit("convert", tiny, out, "--to", "per-expert", "--plan", plan)
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n---\n")
    assert "moekit convert" in card
    assert "4  slice" not in card.split("## Plan")[0]
    assert card.rstrip().endswith("# Tiny")
    assert ExpertPlan.load(out / "plan") == ExpertPlan.load(plan)
    # Once more from the result: our card is replaced, the original one kept.
    again = tmp_path / "again"
    moekit("convert", out, again, "--to", "fused", "--plan", saved(plan, e0=Action(drop=True)))
    card = (again / "README.md").read_text()
    assert card.count("## Plan") == 1
    assert card.count("# Tiny") == 1
    assert load(again).spec.num_experts == 2


def test_compressed_tensors(moekit, refused, tiny, tmp_path):
    args = ("convert", tiny, tmp_path / "out", "--to", "compressed-tensors")
    assert "do not split into groups of 32" in refused(*args)
    done = moekit(*args, "--group-size", "0", "--codec", "int8", "--json").json
    assert done["layout"] == "compressed-tensors"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        name = "model.layers.0.mlp.experts.0.gate_proj.weight_packed"
        assert file.get_slice(name).get_shape() == [16, 8]
    moekit("convert", tmp_path / "out", tmp_path / "dense", "--to", "per-expert")
    assert load(tmp_path / "dense").spec.num_experts == 4


def test_bits_take_a_codec_in_every_format(moekit, refused, tiny, tmp_path):
    plan = saved(tmp_path / "plan.json", e0=Action(bits=16))
    args = ("convert", tiny, tmp_path / "out", "--to", "fused")
    assert "--codec does not apply to --to fused" in refused(*args, "--codec", "int8")
    moekit(*args, "--codec", "int8", "--plan", plan)
    assert (tmp_path / "out" / "plan" / "plan.json").is_file()


def test_a_gguf_file_has_its_card_and_plan_beside_it(moekit, tmp_path):
    save("qwen3_moe", tmp_path / "model")
    plan = ExpertPlan({i: {1: Action(drop=True)} for i in range(3)})
    plan.save(tmp_path / "plan.json")
    out = tmp_path / "x.gguf"
    moekit("convert", tmp_path / "model", out, "--to", "gguf", "--plan", tmp_path / "plan.json")
    card = (tmp_path / "x.gguf.md").read_text()
    assert "--gguf-type f16 --plan x.gguf.plan.json" in card
    assert ExpertPlan.load(tmp_path / "x.gguf.plan.json") == plan
