"""Read-ME: slices of neurons, and a router that decides before the first layer."""

import numpy as np
import pytest
import torch

from moekit.core.cache_score import CacheScore
from moekit.core.errors import UserError
from moekit.core.pack import pack
from moekit.core.replay import replay
from moekit.core.view import MoEView
from moekit.runtime.open import open_engine
from moekit.runtime.predict.gates import gates_of
from moekit.runtime.predict.next_gate import NextGate
from moekit.upcycle.read_me import distillation_loss, slices_of, teacher_of
from moekit.upcycle.run import Request, upcycle
from tests.upcycle.dense_models import logits, read, tokens


def read_me(out, models, data="texts", **options):
    options = {"router_steps": 2, "router_width": 16, **options}
    base, data = str(models["base"]), (str(models["base"].parent / data),)
    return upcycle(Request("read-me", base, (), options, data=data), out, check=False)


def route_of(model, ids):
    logits(model, ids)
    return model.part.route.logits.view(*ids.shape, -1)


def test_shared_and_own_neurons_are_the_mask():
    activity = torch.rand(3, 40, generator=torch.Generator().manual_seed(0))
    cut = slices_of(activity, 0.5)
    for row, own, mask in zip(activity, cut.own, cut.masks, strict=True):
        assert not set(cut.shared.tolist()) & set(own.tolist())
        assert len(cut.shared) + len(own) == len(mask) == 20
        assert set(mask.tolist()) == set(row.topk(20).indices.tolist())


@pytest.mark.parametrize("expert", [0, 1])
def test_with_all_neurons_it_is_the_source_for_any_route(family_of_models, tmp_path, expert):
    read_me(tmp_path / "cut", family_of_models, ratio=1.0)
    model = read(tmp_path / "cut")
    model.part.router.head.register_forward_hook(lambda m, a, o: torch.eye(2)[expert].expand_as(o))
    dense = logits(read(family_of_models["base"]), tokens())
    torch.testing.assert_close(logits(model, tokens()), dense, rtol=1e-5, atol=1e-5)


def test_an_expert_computes_with_its_own_and_the_shared_neurons(family_of_models, tmp_path):
    result = read_me(tmp_path / "cut", family_of_models)
    assert len(result.numbers["shared_width"]) == 2
    for shared, own in zip(
        result.numbers["shared_width"], result.numbers["own_width"], strict=True
    ):
        assert [shared + n for n in own] == [24, 24]
    model, dense = read(tmp_path / "cut"), read(family_of_models["base"])
    block, mlp = model.base.model.layers[0].mlp, dense.model.layers[0].mlp
    x = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    model.part.route.logits = torch.tensor([[0.0, 1.0]])
    with torch.inference_mode():
        made = block(x[None])[0]
        inner = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
        # The neurons that it has are those whose rows it has.
        rows = torch.cat([block.shared_expert.gate_proj.weight, block.experts.gate_up_proj[1, :24]])
        kept = (mlp.gate_proj.weight[:, None] == rows).all(-1).any(-1)
        expected = mlp.down_proj(inner * kept)
    assert int(kept.sum()) == 24
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-5)


def test_a_route_does_not_depend_on_later_tokens(family_of_models, tmp_path):
    read_me(tmp_path / "cut", family_of_models)
    model, ids = read(tmp_path / "cut"), tokens()
    whole, part = route_of(model, ids), route_of(model, ids[:, :5])
    torch.testing.assert_close(whole[:, :5], part, rtol=1e-5, atol=1e-5)


def test_what_later_layers_need_is_known_after_the_first(family_of_models, tmp_path):
    read_me(tmp_path / "cut", family_of_models)
    model, ids = read(tmp_path / "cut"), tokens()
    view = MoEView(model)
    chosen = route_of(model, ids).flatten(0, -2).argmax(-1, keepdim=True).numpy()
    assert 0 < np.count_nonzero(chosen) < chosen.size
    predictor = NextGate(gates_of(view))
    predictor.start(2, 2, 1)
    predictor.begin()
    for row in range(len(chosen)):
        # One token a pass, as in decoding: the route of that pass is what counts.
        model.part.route.logits = route_of(model, ids).flatten(0, -2)[row : row + 1]
        predictor.observe(0, chosen[row : row + 1], torch.randn(1, 32))
        (scores,) = predictor.predict_all(0, [1])
        assert scores.argmax() == chosen[row, 0]
        assert scores.max() > 0.9 > 0.1 > scores.min()


def test_it_runs_from_disk_with_its_routes_known(family_of_models, tmp_path):
    read_me(tmp_path / "cut", family_of_models)
    pack(tmp_path / "cut", tmp_path / "packed", codec="bf16")
    prompt, made = tokens()[:1], []
    for options in ({}, {"expert_cache": 3 * 4096, "predictor": "next-gate"}):
        with open_engine(tmp_path / "packed", max_context=64, streams=1, **options) as engine:
            made.append(engine.generate(prompt, max_new_tokens=8).tolist())
            whole = engine.cache.complete
    assert made[0] == made[1]
    # Three of four experts fit.
    assert not whole


def test_every_layer_has_the_same_expert(family_of_models, tmp_path):
    read_me(tmp_path / "cut", family_of_models)
    model = read(tmp_path / "cut")
    view = MoEView(model)
    with view.trace() as trace:
        logits(model, tokens())
    first, second = (trace.layer(i, 0, len(trace)).topk_ids for i in range(2))
    assert torch.equal(first, second)


def test_decoding_routes_as_reading_does(family_of_models, tmp_path):
    read_me(tmp_path / "cut", family_of_models)
    model, ids = read(tmp_path / "cut"), tokens()
    with torch.inference_mode():
        start = model(ids[:, :8], use_cache=True)
        cache, pieces = start.past_key_values, [start.logits]
        pieces += [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(8, 12)]
    torch.testing.assert_close(torch.cat(pieces, 1), logits(model, ids), rtol=1e-4, atol=1e-4)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], 1)
    mask = torch.cat([torch.zeros(2, 3), torch.ones(2, 12)], 1).long()
    with torch.inference_mode():
        left = model(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    torch.testing.assert_close(left.logits[:, 3:], logits(model, ids), rtol=1e-4, atol=1e-4)


def test_the_teacher_prefers_the_expert_that_holds_what_is_active():
    cut = slices_of(torch.tensor([[9.0, 9, 9, 0, 0, 0], [0, 0, 9, 9, 9, 0]]), 0.5)
    active = torch.tensor([[5.0, 4, 3, 0, 0, 0], [0, 0, 3, 4, 5, 0]])
    teacher = teacher_of(active, cut)
    assert teacher.argmax(-1).tolist() == [0, 1]
    torch.testing.assert_close(teacher.sum(-1), torch.zeros(2), rtol=0, atol=1e-5)
    right, wrong = distillation_loss(teacher, teacher), distillation_loss(-teacher, teacher)
    assert right < wrong


def test_distillation_teaches_the_router_and_the_backbone_may_follow(family_of_models, tmp_path):
    one = read_me(tmp_path / "one", family_of_models, router_steps=1, router_rate=1e-2)
    many = read_me(tmp_path / "many", family_of_models, router_steps=25, router_rate=1e-2)
    assert many.numbers["router_loss"] < one.numbers["router_loss"]
    read_me(tmp_path / "both", family_of_models, backbone_steps=2, rounds=2)
    before, after = (read(tmp_path / n).state_dict() for n in ("one", "both"))
    name = "base.model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(before[name], after[name])


def test_knowing_the_future_never_costs_hits():
    """Belady's rule, which routes known in advance allow, beside the best without them."""
    draw = np.random.default_rng(0)
    ids = draw.zipf(1.5, size=(400, 1, 1)) % 7
    scores = (CacheScore(future="next use"), CacheScore())
    belady, lru = (replay(ids, 7, score, [1, 2, 3]) for score in scores)
    assert (belady.hits >= lru.hits).all()
    assert (belady.hits > lru.hits).any()


@pytest.mark.parametrize(
    ("options", "words"),
    [({"ratio": 0.0}, "above 0"), ({"router_width": 48}, "multiple of 32")],
)
def test_wrong_options(family_of_models, tmp_path, options, words):
    with pytest.raises(UserError, match=words):
        read_me(tmp_path / "cut", family_of_models, **options)


def test_one_domain_is_no_choice(family_of_models, tmp_path):
    with pytest.raises(UserError, match="2 or more"):
        read_me(tmp_path / "cut", family_of_models, data="texts/code.txt")
