"""AWQ's and EAQuant's scales, the router's alignment, and balanced calibration."""

import pytest
import torch

from moekit.compress.quantize.awq import awq_scale, search_awq
from moekit.compress.quantize.balance import default_quota, draw_balanced
from moekit.compress.quantize.block_error import rounding_errors
from moekit.compress.quantize.block_inputs import BlockInputs
from moekit.compress.quantize.planning import QuantizeRequest, plan_quantization
from moekit.compress.quantize.router_rounding import agreement, align_router, choice_divergence
from moekit.compress.quantize.smoothing import (
    otsu_threshold,
    outlier_scale,
    shared_scale,
    smooth_scale,
)
from moekit.core.packed import CodecChoice
from moekit.core.view import MoEView
from moekit.ops.codecs import make_codec
from tests.compress.quantize.models import batches, profiled


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_flat_weights_and_no_exponent_scale_nothing():
    flat = torch.full((5, 64), 0.3) * torch.tensor([1.0, -1.0]).repeat(32)
    scale = awq_scale(random(64).abs(), flat, 0.0, 32)
    assert torch.allclose(scale, torch.ones(64), rtol=1e-6)


def test_the_exponent_leads_from_weights_to_inputs():
    activation, weight = random(64, seed=1).abs() + 0.1, random(8, 64, seed=2)
    scale = awq_scale(activation, weight, 1.0, 32)
    assert torch.allclose(scale / scale[0], activation / activation[0], rtol=1e-3)
    assert float(scale.max() * scale.min()) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("codec", ["int3", "int2-zp"])
def test_searched_scales_leave_a_smaller_error(codec):
    model, _, stats = profiled()
    for layer in MoEView(model):
        inputs = BlockInputs.of(stats, layer.position)
        # A few loud channels, as norms of trained models have them.
        loud = inputs.hidden.clone()
        loud[:, ::16] *= 12
        inputs = BlockInputs(loud, inputs.ids, inputs.weights)
        found = search_awq(layer, [make_codec(codec)] * 8, inputs)
        assert found.inputs is not None
        assert found.errors[1] < 0.9 * found.errors[0]


def test_errors_of_one_expert_alone():
    model, _, stats = profiled()
    layer = MoEView(model)[0]
    inputs = BlockInputs.of(stats, 0)
    codecs = [make_codec(name) for name in ("binary", "int2-zp", "int3-zp")]
    errors = rounding_errors(layer, codecs, inputs, batch=100)
    with torch.no_grad():
        before = layer.run_naive(inputs.hidden, inputs.ids, inputs.weights)
        original = layer.get_expert(5)
        for at, codec in enumerate(codecs):
            expert = original.clone()
            for name, part in expert.tensors().items():
                setattr(expert, name, codec.decode(codec.encode(part)))
            layer.set_expert(5, expert)
            change = layer.run_naive(inputs.hidden, inputs.ids, inputs.weights) - before
            layer.set_expert(5, original)
            expected = sum(float(part.norm()) for part in change.split(100))
            assert float(errors[5, at]) == pytest.approx(expected, rel=1e-4)
    # Two bits over the whole range are hardly better than one; a range that is searched is.
    assert bool((errors[:, 2] < errors[:, :2].amin(1)).all())
    searched = rounding_errors(layer, codecs, inputs, reach=0.6, batch=100)
    assert bool((searched.diff(dim=1) < 0).all())
    assert torch.equal(searched[:, 0], errors[:, 0])


def test_one_expert_has_smoothquants_scale():
    model, _, _ = profiled()
    expert = MoEView(model)[0].get_expert(0)
    peaks = random(1, 64).abs() + 0.1
    rows = torch.cat([expert.gate, expert.up])
    alone = smooth_scale(peaks[0], rows, 0.6)
    assert torch.allclose(alone, peaks[0] ** 0.6 / rows.abs().amax(0) ** 0.4, rtol=1e-6)
    together = shared_scale(peaks, [expert], None)
    assert torch.allclose(together / together[0], alone / alone[0], rtol=1e-5)
    # An expert without tokens has no say.
    both = shared_scale(torch.cat([peaks, torch.zeros(1, 64)]), [expert, expert], None)
    assert torch.equal(both, together)


def test_only_outliers_of_the_middle_are_scaled():
    peaks = random(128).abs() + 1
    peaks[[5, 70]] = torch.tensor([40.0, 90.0])
    scale = outlier_scale(peaks)
    assert (scale != 1).nonzero().flatten().tolist() == [5, 70]
    normal = peaks[(peaks < 30)].max()
    assert float(scale[70]) == pytest.approx(float((90 / normal) ** 0.7))
    assert bool((outlier_scale(torch.full((16,), 3.0)) == 1).all())


def test_otsu_splits_two_groups_between_them():
    values = torch.cat([torch.linspace(0, 1, 30), torch.linspace(9, 10, 10)])
    assert float(otsu_threshold(values)) == pytest.approx(1.0)


def test_clipping_by_divergence_keeps_the_choices_of_heavy_tails():
    weight = random(16, 64) * 0.1
    # A few weights far out set the range, and few of the tokens use their channels.
    weight[:, 0] = torch.linspace(1, 3, 16)
    inputs = random(512, 64, seed=3)
    inputs[:, 0] *= (torch.arange(512) % 32 == 0).float() * 0.1
    expected = inputs @ weight.T
    by_choice = align_router(weight, inputs, 4, bits=4, input_bits=0)
    by_weight = align_router(weight, inputs, 4, bits=4, input_bits=0, by="weights")
    first = agreement(expected, inputs @ by_choice.weight.T, 4)
    second = agreement(expected, inputs @ by_weight.weight.T, 4)
    assert first >= second
    assert by_choice.divergence < by_weight.divergence
    assert by_choice.ratio < by_weight.ratio


def test_a_router_that_is_not_rounded_does_not_diverge():
    logits = random(20, 8)
    assert choice_divergence(logits, logits, 2) == pytest.approx(0, abs=1e-7)
    assert choice_divergence(logits, logits.roll(1, 1), 2) > 0.1
    assert agreement(logits, logits, 2) == 1


def test_a_rounded_router_is_part_of_the_plan():
    model, spec, stats = profiled()
    request = QuantizeRequest("rtn", CodecChoice("int4", 32), router_bits=8)
    made = plan_quantization(request, spec, stats, MoEView(model))
    for layer, row in zip(MoEView(model), made.layers, strict=True):
        value = made.plan.tensors.values[f"{layer.name}.gate.weight"]
        steps = value / (value.abs().amax(1, keepdim=True) / 127)
        assert torch.allclose(steps, steps.round(), atol=1e-3)
        assert row["router_divergence"] < 0.01


def test_sequences_are_drawn_until_every_expert_has_its_quota():
    model, _, _ = profiled()
    view = MoEView(model)
    many = batches(20)
    drawn = draw_balanced(view, many, first=2, quota=60)
    assert drawn.complete
    assert 2 <= len(drawn.batches) < 20
    counts = [torch.zeros(8, dtype=torch.long) for _ in view]

    def count(call):
        counts[call.layer.position] += torch.bincount(call.ids.flatten(), minlength=8)

    with torch.no_grad(), view.observe(count):
        for batch in drawn.batches:
            model(input_ids=batch.ids)
    assert all(bool((c >= 60).all()) for c in counts)


def test_what_stays_short_when_the_text_ends_is_named():
    model, _, _ = profiled()
    drawn = draw_balanced(MoEView(model), batches(2), first=1, quota=10_000)
    assert not drawn.complete
    assert drawn.short == {0: list(range(8)), 1: list(range(8))}
    assert len(drawn.batches) == 2
    assert default_quota(4, 32, 512) == 128
