"""Dense models as MoE of copies and slices: what step 0 computes, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from moekit.core.errors import UserError
from moekit.core.record import RunRecord
from moekit.upcycle.from_dense import _dealt
from moekit.upcycle.layer_choice import chosen_layers
from moekit.upcycle.run import Request, upcycle
from moekit.upcycle.targets import REASONS, TARGETS, Wanted, choose_target
from tests.upcycle.dense_models import SHAPE, dense_config, logits, write_dense

TOKENS = torch.tensor([[5, 70, 131, 9, 250, 17, 3, 88]])

# Sums over experts are taken in another order than in the dense network: float32 rounding.
ROUNDING = 1e-5
SETTINGS = [
    {},
    {"experts": 12, "top_k": 6, "slices": 3, "router": "uniform"},
    {"layers": "every-second", "experts": 4},
    {"shared": 1 / 3, "experts": 8, "top_k": 2, "slices": 2, "partition": "snake"},
    {"shared_copies": 1, "router": "zero"},
    {"weights": "raw", "router": "zero"},
]


PLAIN: dict[str, object] = {}
GRID = [(family, options) for family in sorted(TARGETS) for options in SETTINGS]
# The plain setting of every family is loaded below; llama has a class for each of the others.
FAST = [
    (f, o) for f, o in GRID if o != PLAIN and (f == "llama" or (f == "qwen3" and "shared" in o))
]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """The tiny model of a dense family, written once."""
    root, made = tmp_path_factory.mktemp("dense"), {}

    def of(family: str):
        if family not in made:
            config = CONFIG_MAPPING[family](**SHAPE, sliding_window=None)
            made[family] = write_dense(root / family, config)
        return made[family]

    return of


def difference(first, second) -> float:
    """Largest logit difference as a share of the largest logit, loaded as anyone would."""
    made, wanted = (
        logits(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), TOKENS)
        for path in (first, second)
    )
    return float((made - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("family", sorted(TARGETS))
def test_loads_in_the_stock_class_and_computes_the_same(dense, tmp_path, family):
    upcycle(Request("sparse", str(dense(family))), tmp_path / "out", check=False)
    assert difference(tmp_path / "out", dense(family)) < ROUNDING
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.generate(TOKENS, max_new_tokens=3).shape == (1, 11)


def start_is_equal(source, tmp_path, options) -> None:
    try:
        result = upcycle(Request("dense-to-moe", str(source), options=options), tmp_path / "out")
    except UserError as error:
        # Only where no class of the family can hold what is asked for, and never the plain one.
        refused = "No stock class holds" in str(error) and options != PLAIN
        if not refused:
            raise
        return
    assert result.start.equal_to == "the source"
    assert result.start.tolerance == ROUNDING
    assert result.measured is not None
    assert result.measured < ROUNDING


@pytest.mark.parametrize(("family", "options"), FAST)
def test_equal_to_the_dense_model(dense, tmp_path, family, options):
    start_is_equal(dense(family), tmp_path, options)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "options"), [pair for pair in GRID if pair not in FAST])
def test_equal_to_the_dense_model_in_every_setting(dense, tmp_path, family, options):
    start_is_equal(dense(family), tmp_path, options)


@pytest.mark.parametrize(
    ("family", "options", "target"),
    [
        ("llama", {}, "mixtral"),
        ("mistral", {}, "mixtral"),
        ("llama", {"layers": "every-second"}, "qwen2_moe"),
        ("llama", {"target": "glm4_moe", "shared": 1 / 3, "slices": 2}, "glm4_moe"),
        ("qwen2", {}, "qwen2_moe"),
        ("qwen3", {}, "qwen3_moe"),
        ("qwen3", {"shared_copies": 1}, "glm4_moe"),
        ("olmo2", {}, "flex_olmo"),
        ("granite", {}, "granitemoe"),
    ],
)
def test_the_nearest_class_that_holds_it(dense, tmp_path, family, options, target):
    request = Request("dense-to-moe", str(dense(family)), options=options)
    assert upcycle(request, tmp_path / "out", dry_run=True).model_type == target


@pytest.mark.parametrize(
    "options",
    [
        {"reinit": 0.5},
        {"noise": 0.1},
        {"weights": "raw"},
        {"slices": 3, "experts": 6, "top_k": 2},
        {"slices": 3, "experts": 6, "top_k": 3, "router_noise": 1.0},
        {"slices": 3, "experts": 6, "top_k": 3, "keep_output": False},
    ],
    ids=lambda o: "-".join(o),
)
def test_what_is_said_to_differ_differs(dense, tmp_path, options):
    request = Request("dense-to-moe", str(dense("qwen3")), options=options)
    result = upcycle(request, tmp_path / "out")
    assert result.start.equal_to is None
    assert result.measured is not None
    assert result.measured > 100 * ROUNDING


def test_raw_weights_of_a_zero_router_shrink_the_output_unless_it_is_kept(dense, tmp_path):
    options = {"experts": 8, "top_k": 2, "weights": "raw", "router": "zero", "keep_output": False}
    upcycle(Request("sparse", str(dense("qwen3")), options=options), tmp_path / "out")
    dense_ = AutoModelForCausalLM.from_pretrained(dense("qwen3"))
    sparse = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    hidden = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        whole = dense_.model.layers[0].mlp(hidden)
        part = sparse.model.layers[0].mlp(hidden)
    torch.testing.assert_close(part, whole * 2 / 8, rtol=1e-5, atol=1e-5)


def test_drop_draws_other_neurons_for_every_expert(dense, tmp_path):
    upcycle(Request("drop", str(dense("qwen3")), options={"experts": 4}), tmp_path / "out")
    original = AutoModelForCausalLM.from_pretrained(dense("qwen3")).model.layers[0].mlp
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "out").model.layers[0].mlp.experts
    gates = made.gate_up_proj[:, :48]
    kept = [(gate == original.gate_proj.weight).all(1) for gate in gates]
    assert [int(k.sum()) for k in kept] == [24] * 4
    assert len({tuple(k.tolist()) for k in kept}) == 4
    for gate, down, keep in zip(gates, made.down_proj, kept, strict=True):
        # A neuron is drawn anew as a whole: its row of gate and its column of down.
        assert torch.equal((down == original.down_proj.weight).all(0), keep)
        fresh = gate[~keep]
        # 24 x 32 draws: the mean of their squares is within 20% of that of the source.
        ratio = float(fresh.detach().std() / original.gate_proj.weight.detach().std())
        assert 0.8 < ratio < 1.2


def test_snake_deals_every_neuron_once_and_evenly():
    order = torch.arange(24)
    dealt = _dealt(order, 4, "snake")
    assert sorted(torch.cat(dealt).tolist()) == list(range(24))
    sums = [int(part.sum()) for part in dealt]
    # Summed ranks differ by at most the spread of one row.
    assert max(sums) - min(sums) <= 3


def test_layers_by_name_and_number():
    assert chosen_layers("every-second", 5) == (0, 2, 4)
    assert chosen_layers("second-half", 5) == (2, 3, 4)
    assert chosen_layers("last:2", 5) == (3, 4)
    assert chosen_layers("0 2-3", 5) == (0, 2, 3)
    for wrong in ("some", "7", "last:0"):
        with pytest.raises(UserError, match="layers"):
            chosen_layers(wrong, 5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"slices": 5, "experts": 10}, "48 routed neurons cannot be cut into 5"),
        # 12 neurons: rows of 24 bytes in bfloat16, which torch's grouped product refuses.
        ({"slices": 4}, "slices may be 1, 2, 3, 6"),
        ({"experts": 6, "slices": 4}, "multiple of slices"),
        ({"experts": 2, "top_k": 3}, "1 to 2 experts"),
        ({"shared": 1.0}, "share of the neurons"),
        ({"router": "nearest"}, "router 'nearest' is unknown"),
        ({"weights": "half"}, "renormalised and raw"),
        ({"target": "mixtrall"}, "did you mean mixtral"),
        ({"coppies": 2}, "no option 'coppies'"),
        ({"reinit": 2.0}, "from 0 to 1"),
    ],
    ids=lambda o: "-".join(o) if isinstance(o, dict) else "",
)
def test_refused_before_anything_is_written(dense, tmp_path, options, words):
    with pytest.raises(UserError, match=words):
        upcycle(Request("dense-to-moe", str(dense("llama")), options=options), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("family", ["gemma2", "olmo", "gpt2"])
def test_families_without_a_class_are_refused_by_name_and_reason(family):
    with pytest.raises(UserError, match=f"^{family} cannot") as error:
        choose_target(CONFIG_MAPPING[family](), Wanted(4, 2, 8, (0,)))
    assert REASONS[family] in str(error.value)


def test_weights_without_a_place_are_named(tmp_path):
    source = write_dense(tmp_path / "biased", dense_config("llama", mlp_bias=True))
    with pytest.raises(UserError, match=r"no place in a mixtral; the first is .*bias"):
        upcycle(Request("sparse", str(source)), tmp_path / "out")


def test_record_and_card_say_what_step_0_is(dense, tmp_path):
    result = upcycle(
        Request("sparse", str(dense("qwen2")), options={"experts": 4}), tmp_path / "out", seed=3
    )
    record = RunRecord.load(tmp_path / "out")
    assert (record.command, record.seed) == ("upcycle", 3)
    assert record.metrics["start_measured"] == result.measured < ROUNDING
    assert record.metrics["start"]["equal_to"] == "the source"
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(words in card for words in ("Step 0", "sparse", "experts: 4"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["architectures"], config["dtype"]) == (["Qwen2MoeForCausalLM"], "float32")
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_bfloat16_and_the_layout_of_single_experts(dense, tmp_path):
    request = Request("dynamic-dino", str(dense("llama")), dtype="bfloat16", to="per-expert")
    result = upcycle(request, tmp_path / "out")
    assert result.tensors > 32 * 2
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    # Weights rounded to 8 bits of mantissa, nothing else.
    assert difference(tmp_path / "out", dense("llama")) < 0.05


def test_results_do_not_depend_on_the_run_but_on_the_seed(dense, tmp_path):
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        request = Request("drop", str(dense("llama")), options={"experts": 4})
        upcycle(request, tmp_path / out, seed=seed, check=False)
    first, again, other = (
        (tmp_path / out / "model.safetensors").read_bytes() for out in ("a", "b", "c")
    )
    assert first == again != other
