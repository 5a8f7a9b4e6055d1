"""Every registered router in a model: no leak through depth, the same from a cache."""

import pytest
import torch

from moekit.layers import MoekitConfig, MoekitForCausalLM, RouterContext
from tests.layers.examples import EXPERTS, ROUTER_OPTIONS, ROUTERS, TOP_K

LENGTH = 10


def built(name: str) -> MoekitForCausalLM:
    torch.manual_seed(0)
    model = MoekitForCausalLM(
        MoekitConfig(
            vocab_size=48,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            moe={
                "router": {"name": name, **ROUTER_OPTIONS.get(name, {})},
                "top_k": TOP_K,
                "experts": {"type": "swiglu", "count": EXPERTS, "expert_width": 8},
            },
        )
    )
    with torch.no_grad():
        for path, param in model.named_parameters():
            if ".router." in path or ".pool." in path:
                param.normal_(std=0.4)
    return model.eval()


def ids(seed: int) -> torch.Tensor:
    return torch.randint(48, (1, LENGTH), generator=torch.Generator().manual_seed(seed))


def types(length: int = LENGTH) -> torch.Tensor:
    return (torch.arange(length) % 2)[None]


@pytest.mark.parametrize("name", ROUTERS)
def test_logits_do_not_see_the_future(name):
    model = built(name)
    if not all(layer.causal for layer in model.moe_layers()):
        pytest.skip("says that it is not causal")
    for seed in range(3):
        changed = ids(seed)
        changed[:, 6:] = ids(seed + 50)[:, 6:]
        before = model(ids(seed), token_type_ids=types()).logits[:, :6]
        after = model(changed, token_type_ids=types()).logits[:, :6]
        torch.testing.assert_close(before, after, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ROUTERS)
def test_a_cache_changes_no_logits(name):
    model = built(name)
    layers = model.moe_layers()
    if not all(layer.decodes for layer in layers) or any(layer.sees_batch for layer in layers):
        pytest.skip("needs whole sequences, or drops pairs by the batch")
    whole = model(ids(1), token_type_ids=types()).logits
    first = model(ids(1)[:, :7], token_type_ids=types()[:, :7], use_cache=True)
    found, cache = [first.logits], first.past_key_values
    for place in range(7, LENGTH):
        one = slice(place, place + 1)
        step = model(
            ids(1)[:, one], token_type_ids=types()[:, one], past_key_values=cache, use_cache=True
        )
        found.append(step.logits)
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ROUTERS)
def test_recomputing_activations_changes_no_gradient(name):
    # Draws are keyed by step and layer, and what layers hand on is not overwritten.
    model = built(name).train()
    where = RouterContext(1, LENGTH, step=3, seed=11)
    grads = []
    for recompute in (False, True):
        if recompute:
            model.activation_checkpointing_enable()
        model.zero_grad()
        loss = model(ids(1), labels=ids(1), token_type_ids=types(), router_context=where).loss
        loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for path, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][path], rtol=1e-5, atol=1e-7, msg=path)
