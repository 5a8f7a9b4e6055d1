"""Training models of moekit's own layers from a recipe."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from moekit.core.trace import RoutingTrace
from moekit.layers import MoekitConfig, MoekitForCausalLM
from moekit.layers.stock import stock_family
from moekit.train.forecast import active_parameters
from moekit.train.model import model_config
from moekit.train.recipe import load_recipe
from tests.train.conftest import ROOT, losses, run, write_recipe

ON_CPU = ("--device", "cpu", "--threads", "1")
MODEL = {
    "model_type": "moekit",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "moe": {
        "router": "loss-free",
        "top_k": 2,
        "experts": {"type": "swiglu", "count": 8, "expert_width": 16},
        "shared": {"expert_width": 16},
    },
}


def with_moe(**changes) -> dict:
    return {**MODEL, "moe": {**MODEL["moe"], **changes}}


@pytest.fixture(scope="module")
def trained(texts, tmp_path_factory):
    """The result of a short run on two processes, and its log line on stderr."""
    folder = tmp_path_factory.mktemp("moekit-layers")
    done = run(write_recipe(folder, model=MODEL), texts, folder / "out", processes=2)
    assert done.returncode == 0, done.stderr
    return folder / "out", done.stderr


def test_a_run_ends_as_the_family_it_equals(trained):
    out, said = trained
    assert "written as dots1" in said
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert type(model).__name__ == "Dots1ForCausalLM"
    found = losses(out)
    assert found[-1] < found[0] - 0.1
    # The bias was moved once a step, by the rate or not at all.
    bias = torch.stack([layer.mlp.gate.e_score_correction_bias for layer in model.model.layers])
    assert bias.abs().max() > 0
    steps = bias / 1e-3
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=0.05)


def test_one_process_gives_the_losses_of_two(trained, texts, recipe, tmp_path):
    out, _ = trained
    alone = run(recipe(model=MODEL), texts, tmp_path / "out")
    assert alone.returncode == 0, alone.stderr
    # Gradients are summed in another order.
    assert losses(tmp_path / "out") == pytest.approx(losses(out), abs=1e-4)


def test_what_equals_no_family_stays_moekit(texts, recipe, tmp_path, moekit):
    model = with_moe(router={"name": "top-p", "threshold": 0.3}, top_k=4, shared=None)
    path = recipe(model=model, train={"tokens": 4 * 4 * 32, "probe_at": [0]})
    done = moekit("train", path, "--data", texts, "--out", tmp_path / "out", *ON_CPU)
    assert done.code == 0, done.err
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert isinstance(loaded, MoekitForCausalLM)
    log = (tmp_path / "out" / "training" / "log.jsonl").read_text().splitlines()
    assert len(json.loads(log[-1])["routers"]["imbalance"]) == 2
    probe = RoutingTrace.open(tmp_path / "out" / "training" / "probes" / "step-000000")
    # Ragged: some tokens have fewer than the largest number of experts.
    assert (probe.layer(0).topk_ids < 0).any()


def test_dry_run_counts_parameters(recipe, tmp_path, texts, moekit):
    done = moekit(
        *("train", recipe(model=MODEL), "--data", texts, "--out", tmp_path / "out"),
        *("--dry-run", "--json", *ON_CPU),
    )
    assert done.code == 0, done.err
    details = done.json
    one = 3 * 32 * 16
    # Every expert of two layers but the two that a token uses.
    idle = 2 * 6 * one
    embeddings = 2 * 384 * 32
    assert details["parameters"] - details["active_parameters"] == idle + embeddings


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (with_moe(top_k=9), "top_k 9 is not between 1 and the 8 experts"),
        (with_moe(router="loss-fre"), "did you mean loss-free"),
        (with_moe(router={"name": "switch", "capacity": 0}), "capacity 0 leaves no place"),
        (with_moe(experts={"type": "swiglu", "count": 8, "expert_width": 12}), "multiple of 8"),
        ({**MODEL, "num_hiden_layers": 2}, "did you mean 'num_hidden_layers'"),
        ({**MODEL, "model_type": "moekitt"}, "near matches: ['moekit'"),
    ],
)
def test_bad_values_are_told_before_anything_is_allocated(
    model, message, texts, recipe, tmp_path, moekit
):
    done = moekit("train", recipe(model=model), "--data", texts, "--out", tmp_path / "o", *ON_CPU)
    assert done.code == 2
    assert message in done.err


@pytest.mark.parametrize(("name", "family"), [("loss-free", "dots1"), ("top-p", None)])
def test_shipped_recipes_build(name, family):
    recipe = load_recipe(ROOT / "recipes" / f"moekit-{name}.yaml")
    with torch.device("meta"):
        model = MoekitForCausalLM(model_config(recipe, 8192, 0))
    assert stock_family(model) == family


def test_active_parameters_of_a_dense_model_are_all_but_the_embeddings():
    fields = {**MODEL, "moe": None, "vocab_size": 64}
    fields.pop("model_type")
    attention, mlp, norms = 3 * 32 * 32, 3 * 32 * 64, 2 * 16 + 2 * 32
    model = MoekitForCausalLM(MoekitConfig(**fields))
    assert active_parameters(model) == 2 * (attention + mlp + norms) + 32
