"""convert --plan with new experts: folded, reordered, rounded, rewritten; and the router edits."""

import pytest
import torch
from transformers.utils import logging

from moekit.core.convert import convert
from moekit.core.errors import UserError
from moekit.core.expert_weights import ExpertWeights
from moekit.core.layout import with_num_experts
from moekit.core.new_experts import fold, pad_width, select_neurons, truncate_rank
from moekit.core.plan import Action, ExpertPlan, Fit
from moekit.core.plan_tensors import PlanTensors
from moekit.core.rewrite import Rewrite
from moekit.core.spec import spec_of
from moekit.core.view import MoEView
from moekit.ops.codecs import make_codec
from tests.core.test_convert import logits, same, saved, tensors_of
from tests.families.tiny import TINY, build_tiny, tiny_inputs


@pytest.fixture(autouse=True)
def quiet():
    logging.set_verbosity_error()
    logging.disable_progress_bar()


@pytest.fixture
def model(tmp_path):
    return saved(build_tiny("mixtral"), tmp_path / "model")


def loaded(path, family="mixtral"):
    return type(build_tiny(family)).from_pretrained(path)


def fold_plan(layers, router, **more):
    """Experts 1 and 3 of 8, and 0, 5 and 6, folded in every layer."""
    groups = {1: (0.75, 1), 3: (0.25, 1), 0: (0.5, 0), 5: (0.25, 0), 6: (0.25, 0)}
    actions = {e: Action(group=g, weight=w) for e, (w, g) in groups.items()}
    return ExpertPlan(dict.fromkeys(layers, actions), routers=dict.fromkeys(layers, router), **more)


def expert_norms(layer):
    return [layer.get_expert(e).down.norm().item() for e in range(layer.num_experts)]


def test_folding_is_the_weighted_sum_of_each_matrix(tmp_path, model):
    before = MoEView(loaded(model))
    convert(model, tmp_path / "out", "fused", fold_plan(range(3), "mean"))
    after = MoEView(loaded(tmp_path / "out"))
    for old, new in zip(before, after, strict=True):
        assert new.num_experts == 5
        for slot, members in enumerate(({0: 0.5, 5: 0.25, 6: 0.25}, {1: 0.75, 3: 0.25})):
            for name, part in new.get_expert(slot).tensors().items():
                want = sum(w * old.get_expert(e).tensors()[name] for e, w in members.items())
                assert torch.allclose(part, want, atol=1e-6)  # rounding of float32 sums
            row = sum(w * old.router_weight[e] for e, w in members.items())
            assert torch.allclose(new.router_weight[slot], row, atol=1e-6)
        for slot, e in ((2, 2), (3, 4), (4, 7)):
            assert torch.equal(new.get_expert(slot).down, old.get_expert(e).down)
            assert torch.equal(new.router_weight[slot], old.router_weight[e])


def test_slice_keeps_the_row_of_the_lowest_member(tmp_path, model):
    convert(model, tmp_path / "out", "fused", fold_plan(range(3), "slice"))
    for old, new in zip(MoEView(loaded(model)), MoEView(loaded(tmp_path / "out")), strict=True):
        assert torch.equal(new.router_weight, old.router_weight[[0, 1, 2, 4, 7]])


def test_alias_keeps_every_row_and_copies_the_expert(tmp_path, model):
    result = convert(model, tmp_path / "out", "per-expert", fold_plan(range(3), "alias"))
    assert result.experts == {}
    assert any("written as copies" in note for note in result.notes)
    for old, new in zip(MoEView(loaded(model)), MoEView(loaded(tmp_path / "out")), strict=True):
        assert torch.equal(new.router_weight, old.router_weight)
        assert torch.equal(new.get_expert(5).gate, new.get_expert(0).gate)
        assert torch.equal(new.get_expert(3).up, new.get_expert(1).up)


def test_a_linear_map_mixes_router_rows(tmp_path, model):
    matrix = torch.zeros(7, 8)
    matrix[range(7), [0, 1, 2, 4, 5, 6, 7]] = 1
    matrix[2, 3] = 0.5
    plan = ExpertPlan(
        {i: {3: Action(drop=True)} for i in range(3)},
        routers=dict.fromkeys(range(3), "linear"),
        tensors=PlanTensors(router_maps=dict.fromkeys(range(3), matrix)),
    )
    plan.save(tmp_path / "plan.json")
    assert ExpertPlan.load(tmp_path / "plan.json") == plan
    assert ExpertPlan.load(tmp_path) == plan
    convert(model, tmp_path / "out", "fused", tmp_path)
    for old, new in zip(MoEView(loaded(model)), MoEView(loaded(tmp_path / "out")), strict=True):
        rows = old.router_weight
        assert torch.equal(new.router_weight[[0, 1, 3]], rows[[0, 1, 4]])
        assert torch.allclose(new.router_weight[2], rows[2] + 0.5 * rows[3], atol=1e-6)
        assert torch.equal(new.get_expert(3).up, old.get_expert(4).up)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "nemotron_h", "qwen3_moe"])
def test_reordered_neurons_leave_the_function(tmp_path, family):
    source = build_tiny(family)
    path = saved(source, tmp_path / "model")
    orders = {
        (layer.layer_index, e): torch.randperm(layer.expert_width)
        for layer in spec_of(source).per_layer
        for e in (0, 2)
    }
    plan = ExpertPlan(tensors=PlanTensors(neurons=orders))
    convert(path, tmp_path / "out", "fused", plan)
    inputs = tiny_inputs(family, source)
    # The same products in another order of summation.
    assert torch.allclose(
        logits(loaded(tmp_path / "out", family), inputs), logits(source, inputs), atol=1e-4
    )
    assert not same(tensors_of(path), tensors_of(tmp_path / "out"))


def test_equal_experts_in_another_order_of_neurons_merge_without_loss(tmp_path):
    source = build_tiny("mixtral")
    order = torch.randperm(spec_of(source).expert_width)
    back = torch.argsort(order)
    for layer in MoEView(source):
        layer.set_expert(3, select_neurons(layer.get_expert(1), order))
    path = saved(source, tmp_path / "model")
    actions = {1: Action(group=1, weight=0.5), 3: Action(group=1, weight=0.5)}
    plan = ExpertPlan(
        dict.fromkeys(range(3), actions),
        routers=dict.fromkeys(range(3), "alias"),
        tensors=PlanTensors(neurons={(i, 3): back for i in range(3)}),
    )
    convert(path, tmp_path / "out", "fused", plan)
    inputs = tiny_inputs("mixtral", source)
    assert torch.allclose(
        logits(loaded(tmp_path / "out"), inputs), logits(source, inputs), atol=1e-5
    )


def test_bits_round_as_the_codec_does(tmp_path):
    config = TINY["mixtral"]()
    config.intermediate_size = 64
    model = saved(build_tiny("mixtral", config=config), tmp_path / "model")
    plan = ExpertPlan({1: {2: Action(bits=4), 3: Action(bits=16)}})
    convert(model, tmp_path / "out", "fused", plan)
    old, new = MoEView(loaded(model))[1], MoEView(loaded(tmp_path / "out"))[1]
    codec = make_codec("int4", 32)
    gate = old.get_expert(2).gate
    assert torch.equal(new.get_expert(2).gate, codec.decode(codec.encode(gate)))
    assert torch.equal(new.get_expert(3).up, old.get_expert(3).up.bfloat16().float())
    assert torch.equal(new.get_expert(4).up, old.get_expert(4).up)


def test_bits_that_the_matrices_cannot_have_are_refused_before_writing(tmp_path, model):
    with pytest.raises(UserError, match=r"layer 1, expert 2.*do not split into groups of 32"):
        convert(model, tmp_path / "out", "fused", ExpertPlan({1: {2: Action(bits=4)}}))
    with pytest.raises(UserError, match="there is no codec 'int5'"):
        convert(model, tmp_path / "out", "fused", ExpertPlan({1: {2: Action(bits=5)}}))
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_full_rank_and_small_rank():
    expert = MoEView(build_tiny("mixtral"))[0].get_expert(0)
    full = truncate_rank(expert, min(expert.gate.shape))
    assert torch.equal(full.gate, expert.gate)
    low = truncate_rank(expert, 3)
    assert torch.linalg.matrix_rank(low.gate) == 3
    # Eckart-Young: the error is the energy of the singular values that were cut.
    cut = torch.linalg.svdvals(expert.gate)[3:]
    assert torch.allclose((low.gate - expert.gate).norm(), cut.norm(), rtol=1e-4)


def test_neurons_of_zeros_add_nothing():
    layer = MoEView(build_tiny("gpt_oss"))[0]
    expert = layer.get_expert(0)
    order = torch.arange(8)
    padded = pad_width(select_neurons(expert, order), expert.down.shape[1])
    assert torch.equal(padded.gate[:8], expert.gate[:8])
    assert not padded.gate[8:].any()
    assert not padded.down[:, 8:].any()
    hidden = torch.randn(5, expert.down.shape[0])
    cut = layer.get_expert(0)
    cut.down[:, 8:] = 0
    layer.set_expert(0, padded)
    with_zeros = layer.run_expert(0, hidden)
    layer.set_expert(0, cut)
    assert torch.allclose(with_zeros, layer.run_expert(0, hidden), atol=1e-6)


def test_folding_one_expert_of_weight_one_is_exact():
    expert = MoEView(build_tiny("mixtral"))[0].get_expert(0)
    assert fold({4: 1.0}, lambda e: expert) is expert


class Halved(Rewrite):
    """Halves every matrix down, counts the calls, and sets norms to 2."""

    def __init__(self):
        self.identity = {"method": "halved"}
        self.calls = []

    def expert(self, layer, expert, members, read):
        self.calls.append((layer, expert, dict(members)))
        old = read(expert)
        return ExpertWeights(old.gate, old.up, old.down / 2)

    def other(self, name, tensor):
        return tensor * 2 if "norm" in name else tensor


@pytest.mark.parametrize("to", ["fused", "per-expert"])
def test_a_rewrite_is_asked_once_for_each_expert(tmp_path, model, to):
    rewrite = Halved()
    plan = fold_plan([0], "slice", fit=Fit("halved"))
    plan = ExpertPlan(dict.fromkeys(range(3), plan.layers[0]), fit=plan.fit)
    with pytest.raises(UserError, match="values are computed by halved"):
        convert(model, tmp_path / "out", to, plan)
    convert(model, tmp_path / "out", to, plan, rewrite=rewrite)
    assert sorted(c[:2] for c in rewrite.calls) == [
        (i, e) for i in range(3) for e in (0, 1, 2, 4, 7)
    ]
    assert rewrite.calls[0][2] == {0: 0.5, 5: 0.25, 6: 0.25}
    old, new = loaded(model), loaded(tmp_path / "out")
    assert torch.equal(MoEView(new)[1].get_expert(1).down, MoEView(old)[1].get_expert(1).down / 2)
    before, after = old.state_dict(), new.state_dict()
    name = "model.layers.1.post_attention_layernorm.weight"
    assert torch.equal(after[name], 2 * before[name])
    assert torch.equal(after["model.norm.weight"], before["model.norm.weight"])


def test_an_interrupted_rewrite_resumes_to_the_same_bytes(tmp_path, model):
    class Stops(Halved):
        def expert(self, layer, expert, members, read):
            if len(self.calls) == 5:
                raise KeyboardInterrupt
            return super().expert(layer, expert, members, read)

    plan = fold_plan(range(3), "mean")
    convert(model, tmp_path / "whole", "fused", plan, rewrite=Halved())
    with pytest.raises(KeyboardInterrupt):
        convert(model, tmp_path / "out", "fused", plan, rewrite=Stops())
    other = Halved()
    other.identity = {"method": "other"}
    with pytest.raises(UserError, match="rewrite"):
        convert(model, tmp_path / "out", "fused", plan, rewrite=other)
    convert(model, tmp_path / "out", "fused", plan, rewrite=Halved())
    assert same(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "whole"))
    assert not [p for p in tmp_path.iterdir() if p.name not in ("model", "out", "whole")]


ROUTER_FAMILIES = ("deepseek_v3", "qwen2_moe", "gpt_oss", "lfm2_moe", "longcat_flash", "llama4")


@pytest.mark.parametrize("family", ROUTER_FAMILIES)
@pytest.mark.parametrize("router", ["slice", "mean"])
def test_folding_keeps_every_routing_rule(tmp_path, family, router):
    source = build_tiny(family, config=with_num_experts(TINY[family](), 16))
    path = saved(source, tmp_path / "model")
    layers = {}
    for layer in spec_of(source).per_layer:
        size = layer.num_experts // layer.num_groups
        layers[layer.layer_index] = {
            g * size + i: Action(group=g * size, weight=0.5)
            for g in range(layer.num_groups)
            for i in (0, 1)
        }
    convert(
        path, tmp_path / "out", "fused", ExpertPlan(layers, routers=dict.fromkeys(layers, router))
    )
    new = type(source).from_pretrained(tmp_path / "out")
    for old_layer, layer in zip(MoEView(source), MoEView(new), strict=True):
        groups = spec_of(source).per_layer[0].num_groups
        assert layer.num_experts == 16 - groups
        size = 16 // groups
        pairs = [[e] for e in range(16) if e % size > 1] + [
            [g * size, g * size + 1] for g in range(groups)
        ]
        rows = {min(p): p if router == "mean" else p[:1] for p in pairs}
        weight, bias = old_layer.router_weight, old_layer.correction_bias
        for slot, (_, members) in enumerate(sorted(rows.items())):
            assert torch.allclose(layer.router_weight[slot], weight[members].mean(0), atol=1e-6)
            if bias is not None:
                assert torch.allclose(layer.correction_bias[slot], bias[members].mean(0), atol=1e-6)
        rest = slice(16, old_layer.num_choices)
        assert torch.equal(layer.router_weight[16 - groups : layer.num_choices], weight[rest])
    assert torch.isfinite(logits(new, tiny_inputs(family, new))).all()
