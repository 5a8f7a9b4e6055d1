"""moekit's own layers through the view, the seam and the spec."""

from __future__ import annotations

import pytest
import torch

from moekit.core.find import find_moe
from moekit.core.port import SeamCall
from moekit.core.spec import spec_of
from moekit.core.view import MoEView
from moekit.layers import naive_pool
from tests.layers.test_model import IDS, SWIGLU, model

ROUTERS = {"softmax-renormalised": 2, "loss-free": 2, "top-p": 4, "expert-choice": 4, "switch": 2}


def built(router: str):
    moe = {"router": router, "top_k": 4 if router == "top-p" else 2}
    made = model(moe)
    with torch.no_grad():
        for name, param in made.named_parameters():
            if "router" in name or "pool" in name:
                param.normal_(std=0.3)
    return made


def observed(made, view) -> list[SeamCall]:
    calls: list[SeamCall] = []
    with view.observe(calls.append, logits=True), torch.no_grad():
        made(IDS)
    return calls


@pytest.mark.parametrize("router", ROUTERS)
def test_the_seam_sees_what_the_records_say(router):
    made = built(router)
    view = MoEView(made)
    assert [layer.top_k for layer in view] == [ROUTERS[router]] * 2
    calls = observed(made, view)
    for call, record in zip(calls, made(IDS).routings, strict=True):
        used = call.ids >= 0
        assert torch.equal(call.ids[used], record.expert)
        assert torch.equal(call.weights[used], record.weight)
        assert torch.equal(used.sum(1), torch.bincount(record.token, minlength=18))
        assert torch.equal(call.logits, record.logits)
        again = call.layer.route(call.router_input, **call.context)
        assert torch.equal(again.ids, call.ids)


@pytest.mark.parametrize("router", ROUTERS)
def test_experts_one_by_one_are_the_layer(router):
    made = built(router)
    view = MoEView(made)
    call, record = observed(made, view)[0], made(IDS).routings[0]
    expected = naive_pool(call.layer.block.pool, call.hidden, record)
    # Sums in another order.
    found = call.layer.run_naive(call.hidden, call.ids, call.weights)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    expert = call.layer.get_expert(1)
    bank = call.layer.block.pool.banks[0]
    assert torch.equal(torch.cat([expert.gate, expert.up]), bank.gate_up_proj[1])


def test_a_banned_expert_is_never_chosen_and_nothing_stays_behind():
    made = built("softmax-renormalised")
    view, before = MoEView(made), made(IDS).logits
    with view.ban_experts({0: [2]}):
        ids = observed(made, view)[0].ids
    assert not (ids == 2).any()
    assert torch.equal(made(IDS).logits, before)


def test_a_dropped_choice_is_a_choice_less():
    made = built("softmax-renormalised")

    def first_only(layer, routing, hidden):
        ids = routing.ids.clone()
        ids[:, 1:] = -1
        return type(routing)(routing.logits, routing.weights, ids)

    view = MoEView(made)
    with view.transform_routing(first_only, on="selection"):
        out = made(IDS).logits
    assert not torch.allclose(out, made(IDS).logits)


def test_the_spec_counts_its_parameters():
    made = built("softmax-renormalised")
    spec = spec_of(made)
    assert (spec.num_experts, spec.top_k, spec.expert_width) == (4, 2, 16)
    assert spec.total_params == sum(param.numel() for param in made.parameters())
    assert spec.total_params - spec.active_params == 2 * 2 * 3 * 32 * 16


def test_pools_of_several_banks_are_not_seen():
    made = model({"experts": [SWIGLU, {"type": "zero", "count": 2}]})
    assert find_moe(made) == []
