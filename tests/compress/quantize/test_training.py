"""What is trained: ternary weights through their rounding, and D2MoE's bit router."""

import copy

import pytest
import torch

from moekit.compress import rewrite_of
from moekit.compress.quantize.bit_router import NestedExperts, train_bit_routers
from moekit.compress.quantize.planning import QuantizeRequest, plan_quantization
from moekit.core.packed import CodecChoice
from moekit.core.view import MoEView
from moekit.ops.straight_through import int8_rows, ternary_weight
from tests.compress.quantize.models import batches, profiled


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_weights_have_three_values_and_pass_their_gradient():
    weight = random(16, 24).requires_grad_()
    made = ternary_weight(weight)
    scale = weight.detach().abs().mean()
    assert torch.equal(made.detach().unique(), torch.stack([-scale, 0 * scale, scale]))
    upstream = random(16, 24, seed=1)
    made.backward(upstream)
    assert torch.equal(weight.grad, upstream)


def test_inputs_have_256_steps_and_pass_their_gradient():
    x = random(5, 32).requires_grad_()
    made = int8_rows(x)
    steps = made / (x.abs().amax(-1, keepdim=True) / 127)
    assert torch.allclose(steps, steps.round(), atol=1e-4)
    made.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.fixture
def nested():
    model, spec, stats = profiled()
    view = MoEView(copy.deepcopy(model))
    plan = plan_quantization(QuantizeRequest("rtn", CodecChoice("nested4", 32)), spec, stats).plan
    rewrite = rewrite_of(plan, None, stats)
    encoded = {
        (layer.position, e): rewrite.expert(layer.index, e, {e: 1.0}, layer.get_expert)
        for layer in view
        for e in range(layer.num_experts)
    }
    return NestedExperts(view, encoded, (2, 3, 4))


def logits_at(nested, option):
    """Logits with one option for all tokens."""
    for router in nested.routers:
        router.weight.data.zero_()
    ids = batches(1)[0].ids
    bits = nested.bits
    with torch.no_grad():
        if option is None:
            return nested.view.model(input_ids=ids).logits
        # A bias is what the map does not have; the option's own row of the price does.
        chosen = [nested._options[key] for key in nested._options]
        kept = [list(options) for options in chosen]
        for options in chosen:
            options[:] = [options[option]] * len(bits)
        with nested.active() as spent:
            found = nested.view.model(input_ids=ids).logits
        for options, before in zip(chosen, kept, strict=True):
            options[:] = before
    assert len(spent) == 2
    return found


def test_each_plane_brings_the_logits_nearer(nested):
    plain = logits_at(nested, None)
    errors = [float((logits_at(nested, at) - plain).square().mean()) for at in range(3)]
    assert errors[0] > errors[1] > errors[2] > 0


def test_a_price_lowers_the_bits_and_none_raises_them(nested):
    ids = [batch.ids[:2] for batch in batches(6)] * 2

    def bits():
        with torch.no_grad(), nested.active() as spent:
            nested.view.model(input_ids=ids[0])
        return sum(each.bits for each in spent) / len(spent)

    found = {}
    for price in (0.0, 100.0):
        for router in nested.routers:
            router.weight.data.zero_()
        before = copy.deepcopy(nested.view.model.state_dict())
        losses = train_bit_routers(nested, ids, price=price, capacities=(0.3, 0.4, 0.3))
        assert len(losses) == len(ids)
        found[price] = bits()
        after = nested.view.model.state_dict()
        assert all(torch.equal(after[name], before[name]) for name in after)
    assert found[100.0] < found[0.0]
    assert found[100.0] < 2.5


def test_options_take_no_more_than_their_capacity():
    from moekit.compress.quantize.bit_router import _within

    option = torch.tensor([0] * 10 + [1] * 6 + [2] * 4)
    kept = _within(option, (0.3, 0.4, 0.3), 0)
    assert [int(kept[option == at].sum()) for at in range(3)] == [6, 6, 4]
    assert bool(_within(option, None, 0).all())
