"""The seam's contexts: order, nesting, leaving, and what they refuse."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from torch import Tensor

from moekit.core.errors import UserError
from moekit.core.port import SeamCall
from moekit.core.routing_rule import Routing
from moekit.core.seam import observe, replace_backend
from moekit.core.view import MoEView
from moekit.ops.experts_naive import naive_experts
from tests.families.tiny import build_tiny, tiny_inputs

FAMILY = "qwen3_moe"


@pytest.fixture
def model():
    return build_tiny(FAMILY)


@pytest.fixture
def view(model):
    return MoEView(model)


@pytest.fixture
def inputs(model):
    return tiny_inputs(FAMILY, model)


def run(model, inputs) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def test_transforms_act_in_the_order_of_entering_and_before_observers(view, model, inputs):
    seen: list[SeamCall] = []

    def double(layer, routing, hidden):
        return Routing(routing.logits, routing.weights * 2, routing.ids)

    def add_one(layer, routing, hidden):
        return Routing(routing.logits, routing.weights + 1, routing.ids)

    with view.observe(seen.append):
        run(model, inputs)
    plain = seen.pop(0).weights
    seen.clear()
    with (
        view.observe(seen.append),
        view.transform_routing(double, on="selection"),
        view.transform_routing(add_one, on="selection"),
    ):
        run(model, inputs)
    assert torch.equal(seen[0].weights, plain * 2 + 1)


def test_logits_are_edited_in_the_order_of_entering(view, model, inputs):
    seen: list[SeamCall] = []
    with view.observe(seen.append, logits=True):
        run(model, inputs)
    plain = seen.pop(0).logits
    seen.clear()
    with (
        view.transform_routing(lambda layer, logits, hidden: logits * 2),
        view.transform_routing(lambda layer, logits, hidden: logits + 1),
        view.observe(seen.append, logits=True),
    ):
        run(model, inputs)
    assert torch.equal(seen[0].logits, plain * 2 + 1)


def test_the_backend_entered_last_computes(view, model, inputs):
    def zeros(experts, hidden, ids, weights):
        return torch.zeros_like(hidden)

    used: list[str] = []

    def noted(experts, hidden, ids, weights):
        used.append("noted")
        return naive_experts(experts, hidden, ids, weights)

    expected = run(model, inputs)
    with view.use_backend(zeros), view.use_backend(noted):
        # float32 sums in another order
        torch.testing.assert_close(run(model, inputs), expected, rtol=1e-5, atol=1e-5)
    assert used == ["noted"] * len(view)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0), (1, 0, 2)])
def test_contexts_may_be_left_in_any_order(view, model, inputs, order):
    expected = run(model, inputs)
    calls: list[SeamCall] = []
    contexts = [view.observe(calls.append), view.ban_experts([0]), view.use_backend("eager")]
    stacks = [ExitStack() for _ in contexts]
    for stack, context in zip(stacks, contexts, strict=True):
        stack.enter_context(context)
    banned = run(model, inputs)
    assert not torch.equal(banned, expected)
    for i in order:
        stacks[i].close()
        calls.clear()
        run(model, inputs)
        left = order[: order.index(i) + 1]
        assert bool(calls) == (0 not in left)
    assert torch.equal(run(model, inputs), expected)
    assert all("forward" not in vars(m) for m in model.modules())


def test_two_views_of_one_model_share_the_seam(model, inputs):
    views = [MoEView(model), MoEView(model), MoEView(model.model)]
    calls: list[SeamCall] = []
    with ExitStack() as stack:
        for each in views:
            stack.enter_context(each.observe(calls.append))
        run(model, inputs)
    owners = [next(i for i, v in enumerate(views) if call.layer in v.layers) for call in calls]
    assert owners == [0, 1, 2] * len(views[0])


def test_an_exception_inside_leaves_the_model_clean(view, model, inputs):
    expected = run(model, inputs)

    def fail(call):
        raise RuntimeError("observer")

    with pytest.raises(RuntimeError, match="observer"), view.observe(fail):
        run(model, inputs)
    assert torch.equal(run(model, inputs), expected)
    seen: list[SeamCall] = []
    with view.observe(seen.append):
        run(model, inputs)
    assert seen[0].tokens.batch_shape == tuple(inputs["input_ids"].shape)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_an_instance_forward_of_somebody_else_is_put_back(view, model, inputs):
    experts = view[0].experts
    plain = type(experts).forward

    def offloading(*args):
        return plain(experts, *args)

    experts.forward = offloading
    expected = run(model, inputs)
    calls: list[SeamCall] = []
    with view.observe(calls.append):
        assert torch.equal(run(model, inputs), expected)
    assert len(calls) == len(view)
    assert experts.forward is offloading


def test_a_wrapper_put_around_ours_keeps_working(view, model, inputs):
    expected = run(model, inputs)
    experts = view[0].experts
    with view.observe(lambda call: None):
        ours = experts.forward
        experts.forward = lambda *args: ours(*args)
    assert torch.equal(run(model, inputs), expected)
    calls: list[SeamCall] = []
    with view.observe(calls.append):
        run(model, inputs)
    assert [call.layer.position for call in calls] == [0, 1]


def test_layers_are_chosen_by_position(view, model, inputs):
    calls: list[SeamCall] = []
    with view.observe(calls.append, layers=[1]):
        run(model, inputs)
    assert [call.layer.position for call in calls] == [1]
    with (
        pytest.raises(UserError, match="MoE layers 0 to 1, not 2"),
        observe(view, calls.append, layers=[2]),
    ):
        pass


def test_mask_and_phase_under_generate(view, model, inputs):
    mask = torch.ones_like(inputs["input_ids"])
    mask[1, :3] = 0
    calls: list[SeamCall] = []
    with view.observe(calls.append, layers=[0]):
        out = model.generate(
            inputs["input_ids"],
            attention_mask=mask,
            max_new_tokens=3,
            do_sample=False,
            pad_token_id=0,
        )
    assert [call.phase for call in calls] == ["prefill", "decode", "decode"]
    assert torch.equal(calls[0].mask, mask.flatten().bool())
    assert all(call.mask.all() for call in calls[1:])
    assert [call.tokens.past_length for call in calls] == [0, 9, 10]
    assert torch.equal(calls[2].tokens.input_ids, out[:, -2])


def test_mask_is_found_where_generate_passes_ready_made_ones(view, model, inputs):
    mask = torch.ones_like(inputs["input_ids"])
    mask[1, :3] = 0
    calls: list[SeamCall] = []
    with view.observe(calls.append, layers=[0]):
        model.generate(
            inputs["input_ids"],
            attention_mask=mask,
            max_new_tokens=3,
            do_sample=False,
            pad_token_id=0,
            cache_implementation="static",
        )
    assert [call.phase for call in calls] == ["prefill", "decode", "decode"]
    assert torch.equal(calls[0].mask, mask.flatten().bool())
    assert all(call.mask.all() for call in calls[1:])


def test_a_layer_called_alone_has_no_context(view, model, inputs):
    calls: list[SeamCall] = []
    with view.observe(calls.append, layers=[0]):
        run(model, {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])})
        view[0].block(torch.randn(2, 9, 32))
    assert calls[0].mask is not None
    assert calls[1].mask is None
    assert calls[1].tokens.batch_shape is None


@pytest.mark.parametrize("name", ["eager", "grouped_mm", "batched_mm", "naive"])
def test_named_backends(view, model, inputs, name):
    expected = run(model, inputs)
    with view.use_backend(name):
        torch.testing.assert_close(run(model, inputs), expected, rtol=1e-5, atol=1e-5)
    assert model.config._experts_implementation == build_tiny(FAMILY).config._experts_implementation


def test_unknown_backends_are_refused(view):
    with pytest.raises(UserError, match="unknown experts backend 'fastest'; choose from naive"):
        view.use_backend("fastest").__enter__()
    with pytest.raises(UserError, match="DbrxExperts takes no experts backend by name"):
        MoEView(build_tiny("dbrx")).use_backend("eager").__enter__()
    with pytest.raises(UserError, match="on is 'logits' or 'selection', not 'ids'"):
        view.transform_routing(lambda *a: None, on="ids")


@pytest.mark.parametrize("k", [1, 3])
def test_a_transform_may_change_the_number_of_experts(view, model, inputs, k):
    def top(layer, routing, hidden):
        weights, ids = routing.logits.softmax(-1).topk(k)
        return Routing(routing.logits, weights, ids)

    with (
        view.observe(lambda call: None, logits=True),
        view.transform_routing(top, on="selection"),
    ):
        logits = run(model, inputs)
        with view.use_backend("naive"):
            torch.testing.assert_close(logits, run(model, inputs), rtol=1e-5, atol=1e-5)


def test_bad_transforms_are_refused(view, model, inputs):
    def shorter(layer, routing, hidden):
        return Routing(None, routing.weights[1:], routing.ids[1:])

    def beyond(layer, routing, hidden):
        return Routing(None, routing.weights, routing.ids + 8)

    for fn, message in ((shorter, r"weights \[17, 2\] for 18 tokens"), (beyond, "-1 .none. to 7")):
        with (
            view.transform_routing(fn, on="selection"),
            pytest.raises(ValueError, match=message),
        ):
            run(model, inputs)
    with (
        view.transform_routing(lambda layer, logits, hidden: logits[:, :4]),
        pytest.raises(ValueError, match=r"edited logits are \[18, 4\], expected \[18, 8\]"),
    ):
        run(model, inputs)


def test_bans_are_checked_before_they_act(view):
    with pytest.raises(UserError, match="banning 7 of 8 experts leaves fewer than the 2"):
        view.ban_experts(range(7)).__enter__()
    with pytest.raises(UserError, match=r"choices 0 to 7, not \[9\]"):
        view.ban_experts({0: [9]}).__enter__()
    assert all("forward" not in vars(m) for m in view.model.modules())


def test_ban_beats_a_large_correction_bias():
    model = build_tiny("deepseek_v3")
    view = MoEView(model)
    for layer in view:
        layer.correction_bias[3] = 50.0
    inputs = tiny_inputs("deepseek_v3", model)
    calls: list[SeamCall] = []
    with view.observe(calls.append):
        run(model, inputs)
        assert all((call.ids == 3).any(dim=-1).all() for call in calls)
        calls.clear()
        with view.ban_experts([3]):
            run(model, inputs)
    for call in calls:
        assert not (call.ids == 3).any()
        assert (call.ids >= 0).all()  # the rule itself chose another one


def test_gradients_of_a_transform_survive_checkpointing(view, model, inputs):
    """The recomputed forward must see the same transform, or gradients are wrong."""
    calls: list[SeamCall] = []

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        with (
            view.ban_experts([1]),
            view.transform_routing(lambda layer, logits, hidden: logits * 1.5),
            view.observe(calls.append),
        ):
            model(**inputs).logits.square().mean().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    model.train()
    plain = gradients()
    for reentrant in (False, True):
        calls.clear()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        for name, gradient in gradients().items():
            torch.testing.assert_close(gradient, plain[name], rtol=1e-4, atol=1e-6)
        assert len(calls) == len(view)
    assert any(plain[f"{layer.name}.gate.weight"].any() for layer in view)


def test_gradients_flow_through_a_replaced_backend(view, model, inputs):
    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(**inputs).logits.square().mean().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    with replace_backend(view, naive_experts):
        for name, gradient in gradients().items():
            torch.testing.assert_close(gradient, plain[name], rtol=1e-4, atol=1e-6)
