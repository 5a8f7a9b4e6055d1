"""Every family through the contract of the view, the seam and the trace.

Sequences are padded on the left, so that generation can go on from them.
"""

from __future__ import annotations

import copy
import functools
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moekit.core.layer import MoELayer
from moekit.core.port import SeamCall
from moekit.core.routing_rule import Routing
from moekit.core.spec import spec_of
from moekit.core.trace import DECODE, RoutingTrace
from moekit.core.view import MoEView
from tests.families.received import Witness
from tests.families.routing_oracle import claimed_weights_of
from tests.families.scan import UNDECORATED
from tests.families.tiny import TINY, build_tiny, model_class, supports_generate, tiny_inputs

PADDING = 4
NEW_TOKENS = 4
# Families of layers outside of the seam, all of them in the tiny models' sparse layers.
ADAPTED_LAYERS = {
    "dbrx": 2,
    "doge": 3,
    "jetmoe": 3,
    "llama4": 2,
    "longcat_flash": 2,
    "nllb_moe": 2,
    "step3p7": 2,
    "switch_transformers": 2,
}
# Llama 4 runs every expert on every token, on zeros where it was not chosen; nothing is skipped.
RUNS_EVERY_EXPERT = {"llama4"}
# The experts of nllb_moe do not follow its router, so no rule of the router holds for them; the
# rule of doge has two keys, see tests/families/test_adapters.py.
WITHOUT_RULE = {"nllb_moe", "doge"}
NO_CHECKPOINTING = {"jetmoe"}

families = pytest.mark.parametrize("family", TINY)


@functools.cache
def model_of(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return build_tiny(family, dtype)


def inputs_of(family: str, model: PreTrainedModel) -> dict[str, Tensor]:
    inputs = tiny_inputs(family, model)
    batch, length = inputs["input_ids"].shape
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, :PADDING] = 0
    inputs["attention_mask"] = mask
    if model.config.is_encoder_decoder:
        inputs["decoder_attention_mask"] = mask
    if family == "diffusion_gemma":  # which otherwise starts from random tokens
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :8]
    return inputs


def logits_of(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def observed(view: MoEView, inputs: dict[str, Tensor], **options: Any) -> list[SeamCall]:
    calls: list[SeamCall] = []
    with view.observe(calls.append, **options):
        logits_of(view.model, inputs)
    return calls


@families
def test_view_finds_every_moe_layer(family: str):
    model = model_of(family)
    decorated = [n for n, m in model.named_modules() if hasattr(m, "_is_expert_parallel")]
    view = MoEView(model)
    if family in UNDECORATED:
        assert not decorated
        assert len(view) == ADAPTED_LAYERS[family]
    else:
        assert [f"{layer.name}.experts" for layer in view] == decorated


@families
def test_get_then_set_is_the_identity(family: str):
    model = model_of(family)
    before = {name: p.clone() for name, p in model.named_parameters()}
    for layer in MoEView(model):
        first, last = layer.get_expert(0), layer.get_expert(layer.num_experts - 1)
        assert not torch.equal(first.down, last.down)
        layer.set_expert(0, last)
        layer.set_expert(layer.num_experts - 1, first)
        assert torch.equal(layer.get_expert(0).down, last.down)
        layer.set_expert(0, first)
        layer.set_expert(layer.num_experts - 1, last)
        for e in range(layer.num_experts):
            layer.set_expert(e, layer.get_expert(e))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


@families
def test_expert_weights_are_in_canonical_orientation(family: str):
    for layer in MoEView(model_of(family)):
        expert = layer.get_expert(1)
        assert expert.up is not None
        hidden = torch.randn(5, expert.up.shape[1], generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            up = _linear(hidden, expert.up, expert.up_bias)
            if expert.gate is None:
                inner = _activation(layer)(up)
            else:
                inner = _gated(layer, _linear(hidden, expert.gate, expert.gate_bias), up)
            output = _linear(inner, expert.down, expert.down_bias)
            if getattr(layer.experts, "has_post_expert_norm", False):
                output = layer.experts.post_expert_norm(output)
            # the same operations on contiguous copies of the matrices
            torch.testing.assert_close(output, layer.run_expert(1, hidden), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@families
def test_tracing_leaves_the_logits_bit_equal(family: str, dtype: torch.dtype):
    model = model_of(family, dtype)
    inputs = inputs_of(family, model)
    expected = logits_of(model, inputs)
    view = MoEView(model)
    with view.trace(logits=True):
        assert torch.equal(logits_of(model, inputs), expected)
    with view.trace():
        assert torch.equal(logits_of(model, inputs), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@families
def test_trace_is_what_the_experts_received(family: str, dtype: torch.dtype):
    model = model_of(family, dtype)
    inputs = inputs_of(family, model)
    view = MoEView(model)
    witness = Witness(family, view.layers)
    calls: list[SeamCall] = []
    with view.observe(calls.append), view.trace() as trace:
        logits_of(model, inputs)
    witness.stop()
    witness.confirm(calls)
    mask = inputs["attention_mask"].bool()
    padded = [call for call in calls if call.tokens.batch_shape == mask.shape]
    assert padded
    assert all(torch.equal(call.mask, mask.flatten()) for call in padded)
    assert_traced(trace, _sessions(calls))


@pytest.mark.parametrize("family", [f for f in TINY if supports_generate(f)])
def test_trace_under_generate(family: str):
    model = model_of(family)
    inputs = {k: v for k, v in inputs_of(family, model).items() if not k.startswith("decoder_")}
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(**inputs, **options)
    view = MoEView(model)
    witness = Witness(family, view.layers)
    calls: list[SeamCall] = []
    with view.observe(calls.append), view.trace() as trace:
        assert torch.equal(model.generate(**inputs, **options), expected)
    witness.stop()
    witness.confirm(calls)
    steps = (trace.phase == DECODE).sum()
    assert steps == (NEW_TOKENS - 1) * len(expected)  # the last token is never fed
    assert_traced(trace, _sessions(calls))


@pytest.mark.parametrize("family", [f for f in TINY if f not in NO_CHECKPOINTING])
def test_trace_with_gradient_checkpointing(family: str):
    model = build_tiny(family).train()
    inputs = inputs_of(family, model)
    view = MoEView(model)
    plain_trace, plain_gradients = _traced_step(view, inputs)
    model.gradient_checkpointing_enable()
    witness = Witness(family, view.layers)
    trace, gradients = _traced_step(view, inputs)
    witness.stop()
    assert len(witness.calls) > len({layer.name for layer, _ in witness.calls}), "no recomputation"
    assert len(trace) == len(plain_trace)
    for position in range(len(view)):
        ours, plain = trace.layer(position), plain_trace.layer(position)
        assert torch.equal(ours.topk_ids, plain.topk_ids)
        assert torch.equal(ours.topk_weights, plain.topk_weights)
    for name, gradient in gradients.items():
        # Recomputation repeats the same operations; only sums of gradients may change their order.
        torch.testing.assert_close(gradient, plain_gradients[name], rtol=1e-4, atol=1e-6)


@families
def test_double_loop_reproduces_the_logits(family: str):
    model = model_of(family)
    inputs = inputs_of(family, model)
    expected = logits_of(model, inputs)
    with MoEView(model).use_backend("naive"):
        logits = logits_of(model, inputs)
    # float32 sums in another order; the logits are of order 1
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@families
def test_changed_selection_runs_as_the_double_loop_does(family: str):
    model = model_of(family)
    inputs = inputs_of(family, model)
    view = MoEView(model)
    with view.transform_routing(_rotate, on="selection"):
        logits = logits_of(model, inputs)
        with view.use_backend("naive"):
            expected = logits_of(model, inputs)
    assert not torch.equal(expected, logits_of(model, inputs))
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@families
def test_unchanged_logits_change_nothing(family: str):
    model = model_of(family)
    inputs = inputs_of(family, model)
    expected = logits_of(model, inputs)
    with MoEView(model).transform_routing(lambda layer, logits, hidden: logits.clone()):
        logits = logits_of(model, inputs)
    if family == "doge":  # edited logits go through our own form of its block
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(logits, expected)


@pytest.mark.parametrize("family", [f for f in TINY if f not in RUNS_EVERY_EXPERT])
def test_banned_expert_never_runs(family: str):
    model = copy.deepcopy(model_of(family))
    inputs = inputs_of(family, model)
    expected = logits_of(model, inputs)
    view = MoEView(model)
    banned = _favourite(observed(view, inputs))
    for layer in view:
        poison = layer.get_expert(banned)
        poison.down.fill_(float("nan"))
        layer.set_expert(banned, poison)
    assert not logits_of(model, inputs).isfinite().all()
    with view.ban_experts([banned]):
        logits = logits_of(model, inputs)
    assert logits.isfinite().all()
    assert not torch.equal(logits, expected)


@pytest.mark.parametrize("family", [f for f in TINY if f not in WITHOUT_RULE])
def test_ban_equals_the_rule_by_hand(family: str):
    model = model_of(family)
    inputs = inputs_of(family, model)
    spec = spec_of(model)
    view = MoEView(model)
    banned = _favourite(observed(view, inputs))
    with view.ban_experts([banned]):
        calls = observed(view, inputs)
    for call in calls:
        layer, claimed = call.layer, spec.per_layer[call.layer.position]
        hidden = call.router_input
        plain = layer.route(hidden, **call.context)
        expected = claimed_weights_of(
            claimed, layer, hidden.flatten(0, -2), plain.logits, call.context, [banned]
        )
        dense = torch.zeros(len(call.ids), layer.num_choices + 1)
        dense.scatter_add_(-1, call.ids % dense.shape[-1], call.weights.float())
        experts = slice(0, layer.num_experts)
        assert not dense[:, banned].any()
        # float32 sums of a few terms in another order
        torch.testing.assert_close(
            dense[:, experts], expected[:, experts].float(), rtol=1e-5, atol=1e-6
        )


@families
def test_contexts_leave_the_model_as_it_was_and_spare_its_twin(family: str):
    config = TINY[family]()
    model, twin = (model_class(family)(config).eval() for _ in range(2))
    assert model.config is twin.config
    inputs = inputs_of(family, model)
    expected, twins = logits_of(model, inputs), logits_of(twin, inputs)
    before, settings = _surface(model), config.to_dict()
    view = MoEView(model)
    contexts = [
        view.trace(),
        view.ban_experts([0]),
        view.transform_routing(_halve, on="selection"),
        view.use_backend("naive"),
    ]
    stacks = [ExitStack() for _ in contexts]
    for stack, context in zip(stacks, contexts, strict=True):
        stack.enter_context(context)
    assert not torch.equal(logits_of(model, inputs), expected)
    assert torch.equal(logits_of(twin, inputs), twins)
    assert config.to_dict() == settings
    for i in (1, 3, 0, 2):
        stacks[i].close()
    assert _surface(model) == before
    assert torch.equal(logits_of(model, inputs), expected)


def _linear(hidden: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    return hidden @ matrix.T + (0 if bias is None else bias)


def _activation(layer: MoELayer) -> Any:
    first = layer.experts["expert_0"] if isinstance(layer.experts, nn.ModuleDict) else layer.experts
    return next(getattr(first, n) for n in ("act_fn", "act") if hasattr(first, n))


def _gated(layer: MoELayer, gate: Tensor, up: Tensor) -> Tensor:
    experts = layer.experts
    if hasattr(experts, "_apply_gate"):
        if getattr(experts, "is_concatenated", True):
            return experts._apply_gate(torch.cat([gate, up], dim=-1))
        return experts._apply_gate(torch.stack([gate, up], dim=-1).flatten(-2))
    names = ("act_fn", "activation", "activation_fn")
    holder = getattr(experts, "mlp", experts)
    return next(getattr(holder, n) for n in names if hasattr(holder, n))(gate) * up


def _rotate(layer: MoELayer, routing: Routing, hidden: Tensor) -> Routing:
    """Other experts, other weights, unused choices, and a token without any expert."""
    ids = torch.where(routing.ids < 0, 0, (routing.ids + 1) % layer.num_experts)
    weights = routing.weights / 2 + 0.1
    if ids.shape[1] > 1:
        ids[::2, -1] = -1
    ids[0] = -1
    return Routing(routing.logits, weights.masked_fill(ids < 0, 0), ids)


def _halve(layer: MoELayer, routing: Routing, hidden: Tensor) -> Routing:
    return Routing(routing.logits, routing.weights / 2, routing.ids)


def _favourite(calls: list[SeamCall]) -> int:
    experts = min(call.layer.num_experts for call in calls)
    ids = torch.cat([call.ids.flatten() for call in calls])
    return int(ids[(ids >= 0) & (ids < experts)].mode().values)


def _traced_step(view: MoEView, inputs: dict[str, Any]) -> tuple[RoutingTrace, dict[str, Tensor]]:
    view.model.zero_grad()
    if view.model.config.is_encoder_decoder:
        inputs = {**inputs, "use_cache": False}  # attention with a cache rounds differently
    with view.trace() as trace, torch.random.fork_rng():
        torch.manual_seed(0)  # some routers and dropouts sample while training
        view.model(**inputs).logits.float().square().mean().backward()
    parameters = view.model.named_parameters()
    return trace, {name: p.grad.clone() for name, p in parameters if p.grad is not None}


def _surface(model: nn.Module) -> dict[str, Any]:
    """Everything that can be seen of a model from outside, except for the values of tensors."""
    return {
        name: (sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks))
        for name, m in model.named_modules()
    }


def _sessions(calls: list[SeamCall]) -> list[list[SeamCall]]:
    """Split calls where a prompt begins: nothing is cached yet in another forward than before."""
    sessions: list[list[SeamCall]] = []
    for call in calls:
        forward = call.tokens.forward_id
        known = sessions and forward in {c.tokens.forward_id for c in sessions[-1]}
        if call.tokens.past_length == 0 and not known:
            sessions.append([])
        sessions[-1].append(call)
    return sessions


def assert_traced(trace: RoutingTrace, sessions: list[list[SeamCall]]) -> None:
    """Check a trace against calls: sample by sample, prompt then steps, without padding."""
    for position, layer in enumerate(trace.layers):
        ids, weights = [], []
        for session in sessions:
            forwards = list(dict.fromkeys(c.tokens.forward_id for c in session))
            by_forward = {c.tokens.forward_id: c for c in session if c.layer.position == position}
            shapes = {c.tokens.forward_id: c.tokens for c in session}
            for row in range(next(iter(shapes.values())).batch_shape[0]):
                for forward in forwards:
                    tokens = shapes[forward]
                    length = tokens.batch_shape[1]
                    kept = torch.ones(length, dtype=torch.bool)
                    if tokens.mask is not None:
                        kept = tokens.mask.view(tokens.batch_shape)[row]
                    rows = slice(row * length, (row + 1) * length)
                    call = by_forward.get(forward)
                    ids.append(
                        call.ids[rows][kept]
                        if call
                        else torch.full((int(kept.sum()), layer.top_k), -1)
                    )
                    weights.append(
                        call.weights[rows][kept]
                        if call
                        else torch.zeros(int(kept.sum()), layer.top_k)
                    )
        assert torch.equal(trace.layer(position).topk_ids, torch.cat(ids))
        assert torch.equal(trace.layer(position).topk_weights, torch.cat(weights))
