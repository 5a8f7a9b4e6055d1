"""What is trained: MoTE's ternary experts and D2MoE's bit router."""

import copy

import pytest
import torch
from torch import nn

from moekit.compress import rewrite_of
from moekit.compress.quantize.bit_router import NestedExperts, train_bit_routers
from moekit.compress.quantize.planning import QuantizeRequest, plan_quantization
from moekit.compress.quantize.ternary_experts import (
    MoTE,
    TernaryLinear,
)
from moekit.core.errors import UserError
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


def dense_block():
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 16, bias=False))


def test_without_a_gate_the_model_is_the_dense_one():
    dense, x = dense_block(), random(7, 16)
    block = MoTE(copy.deepcopy(dense), 16, preserve=True)
    assert torch.equal(block(x).hidden, dense(x))
    plain = MoTE(copy.deepcopy(dense), 16)
    # The paper's start is not the dense model: the gate is above zero.
    assert not torch.allclose(plain(x).hidden, dense(x), atol=1e-3)


def test_the_likeliest_expert_is_added_by_its_probability():
    block, x = MoTE(dense_block(), 16, num_experts=3), random(9, 16)
    probabilities = block.router(x).softmax(-1)
    made = block(x)
    for t in range(9):
        i = int(probabilities[t].argmax())
        expected = block.shared(x[t]) + probabilities[t, i] * block.experts[i](x[t : t + 1])[0]
        assert torch.allclose(made.hidden[t], expected, atol=1e-6)
    assert float(made.balance) >= 1 - 1e-6
    assert all(isinstance(m, TernaryLinear) for e in block.experts for m in (e[0], e[2]))


def test_training_moves_experts_and_router_only():
    block = MoTE(dense_block(), 16)
    before = copy.deepcopy(block.state_dict())
    x, target = random(64, 16), random(64, 16, seed=3)
    optimizer = torch.optim.Adam([p for p in block.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(30):
        made = block(x)
        loss = (made.hidden - target).square().mean() + 0.01 * made.balance
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    moved = {n for n, v in block.state_dict().items() if not torch.equal(v, before[n])}
    assert "router.weight" in moved
    assert any(name.startswith("experts.") for name in moved)
    assert not any(name.startswith("shared.") for name in moved)


def test_a_block_without_linear_layers_is_refused():
    with pytest.raises(UserError, match="SiLU has no linear layers"):
        MoTE(nn.SiLU(), 16)


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
