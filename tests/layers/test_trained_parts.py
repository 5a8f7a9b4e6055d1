"""Routers by unit, key, type, prototype, tree and product key, and routed attention, in models."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from moekit.core.errors import UserError
from moekit.layers import MoekitConfig, MoekitForCausalLM, RouterContext

SWIGLU = {"type": "swiglu", "count": 4, "expert_width": 16}
MODULES = {
    "type": "stick-breaking",
    "count": 4,
    "top_k": 2,
    "router": {"name": "moduleformer", "score_width": 16, "sampled": 1},
    "head_width": 8,
}
MONET = {"name": "monet", "heads": 2}
# Reads later tokens outside of training too.
LOOKS_AHEAD = (
    "segment",
    "segment experts",
    "chunk",
    "uoe-data",
    "uoe-sequence",
    "promoe by experts",
)
MODELS = {
    "segment": {"router": {"name": "segment", "size": 4}},
    "chunk": {"router": {"name": "chunk", "size": 4}},
    "segment experts": {
        "router": {"name": "segment", "size": 4},
        "experts": {"type": "segment", "count": 4, "expert_width": 8, "size": 4},
    },
    "delayed": {"router": {"name": "chunk", "size": 4, "delay": 1}},
    "mode": {"router": "mode"},
    "switch-dit": {"router": "switch-dit", "experts": {"type": "linear", "count": 4}},
    "moiie": {"router": "moiie"},
    "ming": {"router": {"name": "ming", "bias_rate": 0.01}},
    "promoe": {"router": {"name": "promoe", "null_type": 1}},
    "promoe by experts": {"router": {"name": "promoe", "select": "experts"}},
    "comet": {"router": "comet"},
    "local search": {"router": {"name": "local-search", "base": "softmax-raw", "steps": 1}},
    "monet horizontal": {
        "router": MONET,
        "experts": {"type": "monet-horizontal", "count": 16, "expert_width": 8},
        "overrides": [{"layers": [1], "router": {**MONET, "reuse": True}}],
    },
    "monet vertical": {
        "router": MONET,
        "experts": {"type": "monet-vertical", "count": 16, "expert_width": 8},
    },
    "uoe-data": {"router": "uoe-data"},
    "uoe-sequence": {"router": "uoe-sequence"},
    "latent": {
        "router": "softmax-raw",
        "experts": {"type": "latent", "count": 4, "expert_width": 16, "group": 2},
    },
    "mote": {
        "router": "softmax-raw",
        "top_k": 1,
        "experts": {"type": "ternary", "count": 4, "expert_width": 16},
        "shared": {"expert_width": 32},
    },
    "moduleformer": {"router": "moduleformer", "attention": MODULES},
    "uoe attention": {
        "router": "softmax-raw",
        "attention": {"type": "heads", "count": 4, "top_k": 2, "router": "softmax-raw"},
    },
}
IDS = torch.randint(48, (2, 10), generator=torch.Generator().manual_seed(0))
TYPES = torch.arange(10).expand(2, 10) % 2


def build(name: str) -> MoekitForCausalLM:
    moe = {"top_k": 2, "experts": SWIGLU, **copy.deepcopy(MODELS[name])}
    config = MoekitConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        moe_attention=moe.pop("attention", None),
        moe=moe,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", MODELS)
def test_trained_two_steps_saved_and_loaded(name, tmp_path):
    model = build(name).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.005)
    losses = []
    for step in range(2):
        context = RouterContext(1, 1, step=step)
        output = model(IDS, labels=IDS, token_type_ids=TYPES, router_context=context)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        model.after_step(output.routings, [routing.counts() for routing in output.routings])
        losses.append(output.loss.item())
    model.eval()
    assert model(IDS, labels=IDS, token_type_ids=TYPES).loss.item() < losses[0]
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ours, theirs = (each(IDS, token_type_ids=TYPES).logits for each in (model, again))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_sees_the_future_only_if_its_router_says_so(name):
    model = build(name).eval()
    causal = all(layer.causal for layer in model.moe_layers())
    assert causal == (name not in LOOKS_AHEAD)
    changed = IDS.clone()
    changed[:, 6:] = (changed[:, 6:] + 7) % 48
    before, after = (model(ids, token_type_ids=TYPES).logits[:, :6] for ids in (IDS, changed))
    if causal:
        # Products of other rows in the batch take other kernels: rounding alone.
        torch.testing.assert_close(before, after, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["moduleformer", "uoe attention"])
def test_attention_experts_keep_a_record_of_their_own_and_refuse_a_cache(name):
    model = build(name).eval()
    routings = model(IDS).routings
    assert [(routing.layer, routing.round) for routing in routings] == [
        (0, -1),
        (0, 0),
        (1, -1),
        (1, 0),
    ]
    with pytest.raises(UserError, match="use_cache=False"):
        model.generate(IDS, max_new_tokens=2, do_sample=False)
    assert model.generate(IDS, max_new_tokens=2, do_sample=False, use_cache=False).shape == (2, 12)


def test_draws_of_attention_and_feed_forward_modules_differ():
    model = build("moduleformer").train()
    first = model(IDS, router_context=RouterContext(1, 1, step=4)).routings
    again = model(IDS, router_context=RouterContext(1, 1, step=4)).routings
    assert all(torch.equal(a.expert, b.expert) for a, b in zip(first, again, strict=True))
    context = RouterContext(2, 10, step=4)
    attention = RouterContext(2, 10, step=4, round=-1)
    draws = [torch.rand(8, generator=c.generator("sampled experts")) for c in (context, attention)]
    assert not torch.equal(*draws)


@pytest.mark.parametrize("name", ["moduleformer", "monet horizontal"])
def test_recomputed_activations_give_the_same_gradients(name):
    # Draws of attention modules, and a decision that a later layer reuses.
    model = build(name).train()
    grads = []
    for recompute in (False, True):
        if recompute:
            model.activation_checkpointing_enable()
        model.zero_grad()
        model(IDS, labels=IDS, router_context=RouterContext(1, 1, step=3)).loss.backward()
        grads.append([param.grad.clone() for param in model.parameters() if param.grad is not None])
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))
