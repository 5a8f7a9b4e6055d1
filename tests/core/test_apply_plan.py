"""convert --plan: experts are really gone, and the model behaves as if they were never chosen."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers.utils import logging

from moekit.core.architecture import meta_model
from moekit.core.convert import convert
from moekit.core.errors import UserError
from moekit.core.layout import expert_axes, with_num_experts
from moekit.core.plan import Action, ExpertPlan
from moekit.core.spec import spec_of
from moekit.core.view import MoEView
from tests.core.test_convert import logits, same, saved, tensors_of
from tests.families.tiny import TINY, build_tiny, tiny_inputs

# One of every routing rule: softmax, normalised after the choice, sigmoid with correction bias,
# limited by groups (best of a group, sum of its two best), shared experts, biases everywhere
# (gpt_oss), sparsemixer, choices without expert (longcat_flash, zaya), rows of shared experts in
# the router (inkling), no gate (nemotron_h), weights on the input (llama4).
FAST = {
    *("mixtral", "qwen3_moe", "qwen2_moe", "deepseek_v2", "deepseek_v3", "gpt_oss", "phimoe"),
    *("longcat_flash", "zaya", "inkling", "nemotron_h", "llama4", "granitemoe", "lfm2_moe"),
}
# Their rules hold no row per expert, or their experts are no bank; each is refused by name.
REFUSED = {
    "dbrx": "has no number under num_experts",
    "deepseek_v4": "chooses experts by hash",
    "diffusion_gemma": "2 sets of experts with layer number",
    "doge": "chooses experts by product key",
    "ernie4_5_vl_moe": "2 sets of experts with layer number",
    "jetmoe": "self_attention.experts.* belongs to no MoE layer",
    "nllb_moe": "2 sets of experts with layer number",
    "switch_transformers": "2 sets of experts with layer number",
}
FAMILIES = [
    f if f in FAST else pytest.param(f, marks=pytest.mark.slow) for f in TINY if f not in REFUSED
]


@pytest.fixture(autouse=True)
def quiet():
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def large(family):
    """A tiny model with 16 experts, so that groups of 4 can lose some."""
    return build_tiny(family, config=with_num_experts(TINY[family](), 16))


def uneven_drops(spec, per_layer=4):
    """Other experts in every layer, as many in every group."""
    plan = {}
    for number, layer in enumerate(spec.per_layer):
        groups = layer.num_groups
        size, share = layer.num_experts // groups, per_layer // groups or 1
        plan[layer.layer_index] = sorted(
            g * size + (number + g + 3 * i) % size for g in range(groups) for i in range(share)
        )
        if groups == 1:
            plan[layer.layer_index] = [(number + 3 * i) % size for i in range(per_layer)]
    return plan


def plan_of(drops):
    return ExpertPlan(
        {layer: dict.fromkeys(experts, Action(drop=True)) for layer, experts in drops.items()}
    )


def sliced_by_hand(model, smaller, drops):
    """Fill `smaller` from `model` through the view, which knows nothing of checkpoints."""
    own = smaller.state_dict()
    fits = {n: t for n, t in model.state_dict().items() if n in own and own[n].shape == t.shape}
    smaller.load_state_dict(fits, strict=False)
    for old, new in zip(MoEView(model), MoEView(smaller), strict=True):
        kept = [e for e in range(old.num_experts) if e not in drops[old.index]]
        for e, source in enumerate(kept):
            new.set_expert(e, old.get_expert(source))
        for name, bank in old.experts.named_parameters():
            if bank.shape[0] > old.num_experts:  # longcat_flash: rows of choices without expert
                rest = bank.data[old.num_experts :]
                new.experts.get_parameter(name).data[new.num_experts :] = rest
        for name in ("router_weight", "router_bias", "correction_bias"):
            target, source = getattr(new, name), getattr(old, name)
            if target is not None:
                rest = range(old.num_experts, source.shape[0])
                target.data.copy_(source.data[[*kept, *rest]])
    return smaller


@pytest.mark.parametrize("family", FAMILIES)
def test_dropped_experts(tmp_path, family):
    path = saved(large(family), tmp_path / "model")
    model = type(large(family)).from_pretrained(path)
    spec = spec_of(model)
    drops = uneven_drops(spec)
    results = {
        to: convert(path, tmp_path / to, to, plan_of(drops)) for to in ("fused", "per-expert")
    }
    left = 16 - len(next(iter(drops.values())))
    assert results["fused"].experts == dict.fromkeys(drops, (16, left))
    pruned = type(model).from_pretrained(tmp_path / "fused")
    assert spec_of(pruned).num_experts == left
    published = type(model).from_pretrained(tmp_path / "per-expert")
    assert same(pruned.state_dict(), published.state_dict())
    smaller = build_tiny(family, seed=1, config=with_num_experts(TINY[family](), left))
    by_hand = sliced_by_hand(model, smaller, drops).state_dict()
    # zaya draws these anew whenever a model is loaded.
    random = {name for name in by_hand if name.endswith("balancing_biases")}
    scales = {name for name in by_hand if name.endswith("per_expert_scale")}
    rest = set(by_hand) - random - scales
    state = pruned.state_dict()
    assert same({n: state[n] for n in rest}, {n: by_hand[n] for n in rest})
    inputs = tiny_inputs(family, model)
    view = MoEView(model)
    with view.ban_experts({layer.position: drops[layer.index] for layer in view}):
        masked = logits(model, inputs)
    # A router of 12 rows is another matrix product than one of 16, and a sum over 12 another sum:
    # rounding only, which is larger where layers recur over the sequence.
    got = logits(pruned, inputs)
    assert torch.allclose(got, masked, atol=1e-4)
    assert (got - logits(model, inputs)).abs().max() > 1e-2


@pytest.mark.parametrize("family", REFUSED)
def test_families_whose_experts_cannot_be_dropped_say_so(tmp_path, family):
    model = build_tiny(family)
    path = saved(model, tmp_path / "model")
    spec = spec_of(model)
    drops = {layer.layer_index: [1, 5] for layer in spec.per_layer}
    with pytest.raises(UserError, match=REFUSED[family]):
        convert(path, tmp_path / "out", "fused", plan_of(drops))
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_every_listed_family_exists():
    assert not (FAST | set(REFUSED)) - set(TINY)


def test_axes_are_found_by_structure():
    model = large("gpt_oss")
    axes = expert_axes(model, meta_model(with_num_experts(model.config, 12)))
    layer = "model.layers.1.mlp."
    found = {n.removeprefix(layer): a.axis for n, a in axes.items() if n.startswith(layer)}
    names = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
    expected = {f"experts.{name}": 0 for name in names}
    assert found == {**expected, "router.weight": 0, "router.bias": 0}
    assert len(axes) == 3 * len(found)
    longcat = large("longcat_flash")
    axes = expert_axes(longcat, meta_model(with_num_experts(longcat.config, 12)))
    router = next(a for n, a in axes.items() if n.endswith("classifier.weight"))
    assert router.entries([0, 2], 16, 20) == [0, 2, 16, 17, 18, 19]


@pytest.fixture
def mixtral(tmp_path):
    return saved(build_tiny("mixtral"), tmp_path / "model")


def refused(path, plan, message):
    with pytest.raises(UserError, match=message):
        convert(path, path.parent / "out", "fused", plan)
    assert [p.name for p in path.parent.iterdir()] == ["model"]


def test_different_counts_are_refused_with_the_numbers(mixtral):
    plan = plan_of({0: [1], 1: [1, 2], 2: [3]})
    refused(mixtral, plan, "leaves 6 experts in layer 1 and 7 in layer 0.*--to packed")
    refused(mixtral, plan_of({1: [1, 2]}), "6 experts in layer 1 and 8 in layer 0")


def test_plans_that_do_not_fit_are_refused(mixtral):
    refused(mixtral, plan_of({0: [8]}), "the layer has experts 0 to 7")
    refused(mixtral, plan_of({0: list(range(7))}), "leaves 1 of 8 experts in layer 0")
    plan = json.loads(plan_of({0: [1]}).to_json())
    plan["model"] = {"model_type": "olmoe", "layers": [0], "num_experts": 8, "top_k": 2}
    refused(mixtral, ExpertPlan.from_json(json.dumps(plan)), "is for another model: olmoe")


def test_a_plan_that_only_protects_is_a_copy(mixtral):
    plan = ExpertPlan({0: {0: Action(protect=True)}})
    result = convert(mixtral, mixtral.parent / "out", "per-expert", plan)
    assert result.experts == {}
    assert same(tensors_of(mixtral), tensors_of(mixtral.parent / "out"))


def test_plan_file_dtype_and_unused_tensors(mixtral):
    drops = {0: [1, 5], 1: [0, 7], 2: [2, 3]}
    plan_of(drops).save(mixtral.parent / "plan.json")
    extra = {"model.layers.9.mlp.experts.0.w1.weight": torch.ones(3)}
    save_file(tensors_of(mixtral) | extra, mixtral / "model.safetensors")
    result = convert(
        mixtral, mixtral.parent / "out", "fused", mixtral.parent / "plan.json", dtype="bfloat16"
    )
    assert result.notes == ["Left out 1 tensors that MixtralForCausalLM does not use."]
    config = json.loads((mixtral.parent / "out" / "config.json").read_text())
    assert (config["num_local_experts"], config["dtype"]) == (6, "bfloat16")
    before = json.loads((mixtral / "config.json").read_text())
    changed = {k for k in config if config[k] != before.get(k)}
    assert changed == {"num_local_experts", "dtype"}
    assert set(before) == set(config)
