"""Every router of this directory in a whole model: two steps of training, saved and loaded."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from moekit.core.errors import UserError
from moekit.layers import MoekitConfig, MoekitForCausalLM, RouterContext
from moekit.train.freeze import parts_of
from moekit.train.model import tap_routers

SWIGLU = {"type": "swiglu", "count": 4, "expert_width": 16}
FREE = [
    {"type": "copy", "count": 1},
    {"type": "constant", "count": 1},
    {"type": "zero", "count": 2},
]
MODELS = {
    "adamoe": {
        "router": {"name": "adamoe", "null": 4},
        "experts": [SWIGLU, {"type": "zero", "count": 4}],
        "top_k": 4,
    },
    "moe++": {"router": "moe++", "experts": [SWIGLU, *FREE]},
    "moe++ as released": {
        "router": {"name": "moe++", "null": 2, "weights": "real", "score": "mlp"},
        "experts": [SWIGLU, *FREE],
    },
    "rmoe": {"router": {"name": "rmoe", "state_width": 8}},
    "ssr": {"router": {"name": "ssr", "probability": 0.5}},
    "graph-of-tokens": {"router": "graph-of-tokens"},
    "attention graph": {"router": {"name": "graph-of-tokens", "graph": "attention"}},
    "thor": {"router": "thor", "top_k": 1},
    "coe": {"router": "softmax-raw", "top_k": 1, "rounds": 2},
    "rexmoe": {
        "router": {"name": "rexmoe", "candidates": 4, "start": 1, "end": 9},
        "experts": {**SWIGLU, "count": 8},
        "share_pool": 2,
    },
    "token-rounding": {"router": {"name": "token-rounding", "tile": 4}},
    "elastic": {"router": "elastic"},
    "progressive-sparsity": {
        "router": {"name": "progressive-sparsity", "until": 1, "early": [3]},
    },
    "emo": {"router": {"name": "emo", "end_id": 5, "largest_pool": 3}},
}
IDS = torch.randint(48, (2, 10), generator=torch.Generator().manual_seed(0))


def build(name: str, **changes) -> MoekitForCausalLM:
    moe = {"top_k": 2, "experts": SWIGLU, **copy.deepcopy(MODELS[name]), **changes}
    config = MoekitConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        attn_implementation="eager" if name == "attention graph" else None,
        moe=moe,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", MODELS)
def test_trained_two_steps_saved_and_loaded(name, tmp_path):
    model = build(name).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    losses = []
    for step in range(2):
        context = RouterContext(1, 1, step=step)
        output = model(IDS, labels=IDS, router_context=context)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        model.after_step(output.routings, [r.counts() for r in output.routings])
        losses.append(float(output.loss.detach()))
    model.eval()
    with torch.no_grad():
        assert float(model(IDS, labels=IDS).loss) < losses[0]
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation=model.config._attn_implementation
    )
    assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("name", MODELS)
def test_no_model_sees_the_future_outside_of_training(name):
    model = build(name).eval()
    changed = IDS.clone()
    changed[:, 6:] = (changed[:, 6:] + 7) % 48
    before, after = model(IDS).logits[:, :6], model(changed).logits[:, :6]
    torch.testing.assert_close(before, after, rtol=0, atol=1e-6)


def test_the_recurrent_cell_is_saved_once(tmp_path):
    model = build("rmoe")
    names = [name for name in model.state_dict() if "weight_state" in name]
    assert names == ["model.shared.rmoe.weight_state"]


def test_a_shared_experts_gradient_is_the_sum_over_the_layers():
    model = build("rexmoe")
    banks = [layer.pool.banks[0] for layer in model.moe_layers()]
    assert banks[0] is banks[1]
    # Expert parameters of two layers' own experts, router rows of two layers for both.
    own = build("rexmoe", experts=SWIGLU, share_pool=1, router="softmax-raw")
    size = [sum(p.numel() for n, p in m.named_parameters() if "pool" in n) for m in (model, own)]
    assert size[0] == size[1]
    untied = copy.deepcopy(model)
    first, second = untied.moe_layers()
    # A pool of the second layer's own, of the same weights.
    second._lent = (copy.deepcopy(first.pool),)
    for each in (model, untied):
        each.eval()(IDS, labels=IDS).loss.backward()
    total = first.pool.banks[0].down_proj.grad + second.pool.banks[0].down_proj.grad
    torch.testing.assert_close(banks[0].down_proj.grad, total)


def test_null_experts_that_are_none_are_told():
    with pytest.raises(UserError, match="the last 3 experts of the pool are not all of type zero"):
        build("moe++", router={"name": "moe++", "null": 3, "weights": "real"})
    with pytest.raises(UserError, match="the last 4 experts"):
        build("adamoe", experts={**SWIGLU, "count": 8})


def test_a_graph_over_tokens_refuses_a_cache():
    model = build("graph-of-tokens").eval()
    with pytest.raises(UserError, match="use_cache=False"):
        model.generate(IDS, max_new_tokens=2, do_sample=False)


def test_the_shared_cell_belongs_to_the_routers():
    # Elsewhere it would be trained as a matrix of the hidden layers, and not be frozen with them.
    model = build("rmoe")
    cell = {id(param) for param in model.model.shared.parameters()}
    assert len(cell) == 4
    assert cell <= {id(param) for param in parts_of(model)["routers"]}
    assert "model.shared.rmoe.weight_state" in tap_routers(model).router_names
