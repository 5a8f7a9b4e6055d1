"""Models of moekit's layers: built from a config, saved, loaded, run with and without a cache."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from moekit.core.errors import UserError
from moekit.layers.config import MoekitConfig
from moekit.layers.context import RouterContext
from moekit.layers.model import MoekitForCausalLM

SWIGLU = {"type": "swiglu", "count": 4, "expert_width": 16}
MOE = {"router": "softmax-renormalised", "top_k": 2, "experts": SWIGLU, "layers": {"first": 1}}
LATENT = {
    "attention": "deepseek_v3",
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}


def config(moe=None, **fields) -> MoekitConfig:
    values = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return MoekitConfig(**{**values, "moe": copy.deepcopy({**MOE, **(moe or {})}), **fields})


def model(moe=None, **fields) -> MoekitForCausalLM:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config(moe, **fields)).eval()


IDS = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"attention": "mixtral", "tie_word_embeddings": True},
        LATENT,
        {
            "moe": {
                "router": {"name": "deepseek-v3", "groups": 2},
                "experts": {**SWIGLU, "count": 8},
            }
        },
        {"moe": {"shared": {"expert_width": 24, "join": "coefficients"}}},
    ],
    ids=["qwen3", "mixtral", "latent", "deepseek-v3", "residual"],
)
def test_saved_and_loaded_by_auto_classes(fields, tmp_path):
    built = model(**fields)
    logits = built(IDS).logits
    built.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert isinstance(again, MoekitForCausalLM)
    assert torch.equal(again(IDS).logits, logits)


def test_a_cache_changes_nothing():
    built = model()
    cached = built.generate(IDS, max_new_tokens=6, do_sample=False)
    whole = built.generate(IDS, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(cached, whole)


def test_a_capacity_does_not_forbid_a_cache():
    built = model({"router": "gshard"})
    assert built.generate(IDS, max_new_tokens=3, do_sample=False).shape == (2, 12)


def test_a_router_that_looks_ahead_refuses_a_cache():
    built = model({"router": "expert-choice"})
    with pytest.raises(UserError, match="use_cache=False"):
        built.generate(IDS, max_new_tokens=3, do_sample=False)
    assert built.generate(IDS, max_new_tokens=3, do_sample=False, use_cache=False).shape == (2, 12)


def test_padding_is_not_counted_and_changes_nothing():
    built = model()
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[:, :3] = 0
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), IDS], 1)
    position = (mask.cumsum(-1) - 1).clamp_min(0)
    out = built(padded, attention_mask=mask, position_ids=position)
    # Another mask takes another attention kernel; the same sums in another order.
    torch.testing.assert_close(out.logits[:, 3:], built(IDS).logits, rtol=0, atol=1e-5)
    assert [int(r.counts().sum()) for r in out.routings] == [2 * 18, 2 * 18]


@pytest.mark.parametrize("router", ["switch", "softmax-renormalised"])
def test_recomputed_activations_give_the_same_gradients(router):
    # Switch jitters its input and drops: a second draw would route otherwise.
    built = model({"router": router, "top_k": 1 if router == "switch" else 2}).train()
    where = RouterContext(1, 1, step=3, seed=7)
    grads = []
    for recompute in (False, True):
        if recompute:
            built.activation_checkpointing_enable()
        built.zero_grad()
        built(IDS, labels=IDS, router_context=where).loss.backward()
        grads.append([param.grad.clone() for param in built.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_layers_placement_pyramid_and_dense():
    override = {"layers": [2], "experts": {**SWIGLU, "count": 8}, "top_k": 3}
    built = model({"layers": [0, 2], "overrides": [override]})
    routings = built(IDS).routings
    assert [(r.layer, r.num_experts, r.top_k) for r in routings] == [(0, 4, 2), (2, 8, 3)]
    assert sum("pool" in name for name, _ in built.named_parameters()) == 2 * 2


def test_layers_that_share_a_pool_hold_it_once(tmp_path):
    built = model({"layers": None, "share_pool": 2}, num_hidden_layers=4)
    layers = built.moe_layers()
    assert layers[0].pool is layers[1].pool
    assert layers[2].pool is layers[3].pool is not layers[0].pool
    assert sum("pool" in name for name, _ in built.named_parameters()) == 2 * 2
    built.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(IDS).logits, built(IDS).logits)


def test_the_bias_moves_against_the_load():
    built = model({"router": "loss-free"})
    routings = built(IDS).routings
    counts = [torch.tensor([8.0, 2.0, 5.0, 5.0]), torch.tensor([0.0, 0.0, 0.0, 18.0])]
    built.after_step(routings, counts)
    moved = [layer.router.terms._modules["0"].expert_bias for layer in built.moe_layers()]
    assert torch.equal(moved[0], 1e-3 * torch.tensor([-1.0, 1.0, 0.0, 0.0]))
    assert torch.equal(moved[1], 1e-3 * torch.tensor([1.0, 1.0, 1.0, -1.0]))


@pytest.mark.parametrize(
    ("moe", "message"),
    [
        ({"top_k": 5}, "top_k 5 is not between 1 and the 4 experts"),
        ({"router": "softmax-row"}, "did you mean softmax-raw"),
        ({"router": {"name": "switch", "capasity": 1.0}}, "did you mean 'capacity'"),
        ({"router": {"name": "switch", "capacity": 0}}, "capacity 0 leaves no place"),
        ({"router": {"name": "moge", "groups": 3}}, "groups 3 does not divide the 4 experts"),
        ({"experts": {**SWIGLU, "expert_width": 10}}, "expert_width 10 .* multiple of 8"),
        ({"experts": {**SWIGLU, "type": "swigloo"}}, "did you mean swiglu"),
        ({"experts": {"type": "swiglu", "expert_width": 16}}, "moe.experts has no count"),
        ({"layers": [7]}, r"names \[7\], but the model has layers 0 to 2"),
        ({"tok_k": 2}, "in moe the field 'tok_k' is unknown: did you mean 'top_k'"),
        ({"experts": "swiglu"}, "moe.experts is 'swiglu'; expected fields"),
        ({"experts": {**SWIGLU, "count": "4"}}, "moe.experts.count is '4'"),
        ({"layers": 2}, "moe.layers is 2; expected a list"),
        ({"router": 5}, "moe.router has no name"),
        ({"shared": {"expert_width": 16, "join": "summ"}}, "did you mean 'sum'"),
        ({"router": "softmax-renormalised", "top_k": 1}, "never learns"),
    ],
)
def test_wrong_values_are_told(moe, message):
    with pytest.raises(UserError, match=message):
        model(moe)


def test_unknown_attention_is_told():
    with pytest.raises(UserError, match="did you mean 'mixtral'"):
        model(attention="mixtrall")
