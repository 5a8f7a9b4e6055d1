"""The rewrite that rounds experts: identity, GPTQ, scales, bits and fallbacks."""

import dataclasses

import pytest
import torch

from moekit.compress import apply_live, rewrite_of
from moekit.compress.quantize import rounding
from moekit.compress.quantize.block_inputs import BlockInputs
from moekit.compress.quantize.layer_experts import middle_of, output_of
from moekit.compress.quantize.planning import QuantizeRequest, plan_quantization
from moekit.compress.quantize.quantizers import quantizer
from moekit.compress.quantize.rounding import Fallback
from moekit.core.errors import UserError
from moekit.core.new_experts import decode_expert
from moekit.core.packed import CodecChoice
from moekit.core.plan import Action, ExpertPlan
from moekit.core.view import MoEView
from moekit.ops.codecs import make_codec
from moekit.ops.gptq import proxy_loss
from tests.compress.quantize.models import batches, profiled, wide_model


def request_of(method="rtn", codec="int4", **fields):
    return QuantizeRequest(method, CodecChoice(codec, 32), **fields)


def planned(request):
    model, spec, stats = profiled()
    plan = plan_quantization(request, spec, stats, MoEView(model)).plan
    return plan, rewrite_of(plan, None, stats)


def change_of(request):
    """Mean squared change of the logits under a request."""
    model, _, _ = profiled()
    plan, rewrite = planned(request)
    ids = batches()[0].ids
    with torch.no_grad():
        before = model(input_ids=ids).logits
        with apply_live(MoEView(model), plan, rewrite, rewrite.codec):
            after = model(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids).logits, before)
    return float((after.detach() - before).square().mean())


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_sixteen_bits_of_a_16_bit_model_change_nothing(method):
    _, spec, stats = profiled()
    small = wide_model().bfloat16()
    plan = plan_quantization(request_of(method, "bf16"), spec, stats).plan
    with (
        torch.no_grad(),
        apply_live(MoEView(small), plan, rewrite_of(plan, None, stats), CodecChoice("bf16", 32)),
    ):
        for layer, before in zip(MoEView(small), MoEView(wide_model().bfloat16()), strict=True):
            for e in range(layer.num_experts):
                parts = zip(
                    layer.get_expert(e).tensors().values(),
                    before.get_expert(e).tensors().values(),
                    strict=True,
                )
                assert all(torch.equal(new, old) for new, old in parts)


def test_rounding_to_nearest_is_the_codec():
    model, _, _ = profiled()
    _, rewrite = planned(request_of("rtn", "int4-zp"))
    layer = MoEView(model)[1]
    made = rewrite.expert(layer.index, 3, {3: 1.0}, layer.get_expert)
    codec = make_codec("int4-zp", 32)
    for name, matrix in layer.get_expert(3).tensors().items():
        expected = codec.encode(matrix)
        assert all(
            torch.equal(made.matrices[name].planes[0][part], array)
            for part, array in expected.planes[0].items()
        )


@pytest.mark.parametrize("codec", ["int4", "int3-zp", "int2-zp", "nested4", "ternary-rows"])
def test_gptq_serves_the_experts_inputs_better(codec):
    model, _, stats = profiled()
    _, plain = planned(request_of("rtn", codec))
    # Planes are rounded in blocks, which must be smaller than the matrices here.
    _, fitted = planned(request_of("gptq", codec, block=16 if codec != "nested4" else 32))
    layer = MoEView(model)[0]
    for e in range(layer.num_experts):
        expert = layer.get_expert(e)
        moments = {"gate": "input_second", "up": "input_second", "down": "middle_second"}
        for name, moment in moments.items():
            # Middles have a width of one group, which is one block of planes.
            if codec == "nested4" and name == "down":
                continue
            losses = []
            for rewrite in (plain, fitted):
                made = rewrite.expert(layer.index, e, {e: 1.0}, layer.get_expert)
                weight = make_codec(codec, 32).decode(made.matrices[name])
                losses.append(
                    float(proxy_loss(weight - expert.tensors()[name], stats.get(0, moment)[e]))
                )
            assert losses[1] < losses[0], (e, name)
    assert fitted.fallbacks == []


def test_experts_computed_together_are_those_computed_alone(monkeypatch):
    model, _, _ = profiled()
    layer = MoEView(model)[0]
    request = request_of("gptq", "int3-zp", bits_average=2.0, allocation="mc-moe")
    made = {}
    for size in (1, 2**28):
        monkeypatch.setattr(rounding, "BATCH_BYTES", size)
        _, rewrite = planned(request)
        asked = []

        def read(e, asked=asked):
            asked.append(e)
            return layer.get_expert(e)

        # In another order than that of the layer, and one of them again.
        made[size] = [rewrite.expert(0, e, {e: 1.0}, read) for e in (5, 6, 7, 0, 1, 2, 3, 4, 6)]
        assert len(asked) >= 9 if size == 1 else set(asked) == set(range(8))
    for one, two in zip(*made.values(), strict=True):
        for name in one.matrices:
            assert all(
                torch.equal(array, two.matrices[name].planes[0][part])
                for part, array in one.matrices[name].planes[0].items()
            )


def test_the_order_of_the_methods_on_the_logits():
    rounded = change_of(request_of("rtn", "int3-zp"))
    assert change_of(request_of("gptq", "int3-zp")) < rounded
    assert change_of(request_of("rtn", "int8")) < rounded / 100
    assert change_of(request_of("awq", "int3-zp", solver="gptq")) < rounded


def test_experts_with_few_tokens_fall_back_and_are_reported():
    model, spec, stats = profiled()
    tokens = stats.get(0, "moment_tokens")
    quota = int(tokens.median()) + 1
    short = [e for e in range(8) if tokens[e] < quota]
    layer = MoEView(model)[0]
    made = {}
    for fallback in ("pooled", "nearest"):
        request = request_of("gptq", "int3-zp", min_tokens=quota, fallback=fallback)
        plan = plan_quantization(request, spec, stats).plan
        rewrite = rewrite_of(plan, None, stats)
        made[fallback] = [
            rewrite.expert(layer.index, e, {e: 1.0}, layer.get_expert) for e in range(8)
        ]
        done = "gptq on the inputs of all experts"
        done = done if fallback == "pooled" else "rounded to nearest"
        there = [found for found in rewrite.fallbacks if found.layer == layer.index]
        assert there == [Fallback(layer.index, e, int(tokens[e]), done) for e in short]
    codec = make_codec("int3-zp", 32)
    pooled = stats.get(0, "input_second").sum(0)
    for e in short:
        expert = layer.get_expert(e)
        nearest = codec.decode(codec.encode(expert.gate))
        assert torch.equal(codec.decode(made["nearest"][e].matrices["gate"]), nearest)
        better = codec.decode(made["pooled"][e].matrices["gate"])
        assert proxy_loss(better - expert.gate, pooled) < proxy_loss(nearest - expert.gate, pooled)
        down = codec.decode(codec.encode(expert.down))
        assert torch.equal(codec.decode(made["pooled"][e].matrices["down"]), down)


def test_bits_by_expert_and_protected_experts():
    model, _, _ = profiled()
    request = request_of(
        "gptq", "int3-zp", bits_average=2.0, allocation="mc-moe", protect={0: {1, 6}}
    )
    plan, rewrite = planned(request)
    layer = MoEView(model)[0]
    names = {1: "binary", 2: "int2-zp", 3: "int3-zp", 16: "bf16"}
    assert plan.action(0, 1).bits == plan.action(0, 6).bits == 16
    assert {plan.action(1, e).bits for e in range(8)} >= {2, 3}
    assert sum(plan.action(1, e).bits for e in range(8)) <= 16
    for e in range(8):
        made = rewrite.expert(0, e, {e: 1.0}, layer.get_expert)
        wanted = make_codec(names[plan.action(0, e).bits], 32)
        assert made.codec.layout((32, 64)) == wanted.layout((32, 64))
    # Not written as 16 bits, but as they were.
    assert torch.equal(
        make_codec("bf16").decode(rewrite.expert(0, 1, {1: 1.0}, layer.get_expert).matrices["up"]),
        layer.get_expert(1).up.bfloat16().float(),
    )


def test_mixed_bits_beat_the_same_average_for_all():
    mixed = change_of(request_of("gptq", "int3-zp", bits_average=2.0, allocation="mc-moe"))
    assert mixed < change_of(request_of("gptq", "int2-zp"))


@pytest.mark.parametrize("method", ["awq", "eaquant"])
def test_scaled_values_fold_back_to_the_model(method):
    """At 16 bits what is left of a scaling method is the folding itself."""
    assert change_of(request_of(method, "fp32")) < 1e-6


def test_a_plan_that_was_saved_gives_the_same_values(tmp_path):
    model, _, stats = profiled()
    plan, rewrite = planned(request_of("awq", "int3-zp"))
    stats.save(tmp_path / "stats")
    fit = dataclasses.replace(plan.fit, stats=str(tmp_path / "stats"))
    plan = dataclasses.replace(plan, fit=fit)
    plan.save(tmp_path / "plan.json")
    again = rewrite_of(ExpertPlan.load(tmp_path / "plan.json"), None)
    layer = MoEView(model)[0]
    one, two = (r.expert(layer.index, 2, {2: 1.0}, layer.get_expert) for r in (rewrite, again))
    for name in one.matrices:
        assert torch.equal(
            one.matrices[name].planes[0]["payload"], two.matrices[name].planes[0]["payload"]
        )
    assert again.identity["codec"] == rewrite.identity["codec"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "quip"}, "--method quip is unknown; there are rtn, gptq, autoround, awq"),
        ({"bits_average": 2.0}, "go together"),
        ({"allocation": "mc-moe"}, "go together"),
        ({"bits_average": 1.0, "allocation": "mc-moe"}, "gives 8 bits to the 8 experts"),
        ({"codec": CodecChoice("int4", 128)}, r"layer 0: .*64 columns"),
        ({"reach": 1.5}, "--reach 1.5 must lie between 0 and 0.95"),
        ({"solver": "gptq"}, "take --method gptq"),
        ({"protect": {0: {9}}}, "layer 0 has no expert 9"),
        ({"fallback": "guess"}, "--fallback guess is unknown"),
    ],
)
def test_wrong_requests_are_refused_before_any_work(fields, message):
    _, spec, _ = profiled()
    with pytest.raises(UserError, match=message):
        QuantizeRequest(**fields).check(spec)


def test_what_no_stats_fit_is_refused():
    _, _, stats = profiled()
    with pytest.raises(UserError, match="needs stats with the set full"):
        quantizer(ExpertPlan(), None, solver="gptq")
    folded = ExpertPlan({0: {0: Action(group=0, weight=0.5), 1: Action(group=0, weight=0.5)}})
    with pytest.raises(UserError, match="Apply it first"):
        quantizer(folded, stats, solver="gptq")


@pytest.mark.parametrize("codec", ["int3-zp", "int2-zp", "int4"])
def test_learned_rounding_serves_the_sampled_tokens_better(codec, tmp_path):
    model, spec, stats = profiled()
    model.config.save_pretrained(tmp_path)
    layer = MoEView(model)[1]
    inputs = BlockInputs.of(stats, 1)
    request = request_of("autoround", codec, steps=40)
    plan = plan_quantization(request, spec, stats).plan
    fitted = rewrite_of(plan, tmp_path, stats)
    _, plain = planned(request_of("rtn", codec))
    for e in (0, 5):
        tokens, gates = inputs.of_expert(e)
        hidden, original = inputs.hidden[tokens], layer.get_expert(e)

        def output(expert, hidden=hidden, gates=gates):
            with torch.no_grad():
                return output_of(layer, expert, middle_of(layer, expert, hidden)) * gates[:, None]

        errors = []
        for rewrite in (plain, fitted):
            made = rewrite.expert(layer.index, e, {e: 1.0}, layer.get_expert)
            made = decode_expert(made, torch.float32)
            errors.append(float((output(made) - output(original)).square().mean()))
        assert errors[1] < 0.8 * errors[0]


def test_without_steps_learned_rounding_is_to_nearest(tmp_path):
    model, spec, stats = profiled()
    model.config.save_pretrained(tmp_path)
    layer = MoEView(model)[0]
    plan = plan_quantization(request_of("autoround", "int3-zp", steps=0), spec, stats).plan
    made = rewrite_of(plan, tmp_path, stats).expert(0, 4, {4: 1.0}, layer.get_expert)
    codec = make_codec("int3-zp", 32)
    for name, matrix in layer.get_expert(4).tensors().items():
        found = codec.decode(made.matrices[name])
        # A zero point at the middle of two may be rounded the other way.
        same = (found == codec.decode(codec.encode(matrix))).float().mean()
        assert same > 0.99, name
