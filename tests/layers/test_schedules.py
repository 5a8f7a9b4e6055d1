"""Routers that change with the step: Sigma-MoE, ReXMoE and ElasticMoE."""

import pytest
import torch

from moekit.core.errors import UserError
from moekit.layers import RouterContext, build_router
from moekit.layers.routers.candidate_schedule import candidate_count

D, E, K, T = 16, 8, 2, 32


def hidden() -> torch.Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(0))


def plain(weight: torch.Tensor):
    router = build_router("softmax-raw", D, E, K)
    router.score.weight = weight
    return router(hidden(), RouterContext(1, T))


def same(first, second) -> bool:
    return torch.equal(first.expert, second.expert) and torch.equal(first.weight, second.weight)


def sparsity(**options):
    torch.manual_seed(0)
    return build_router("progressive-sparsity", D, E, K, **options)


def test_low_layers_start_with_more_experts_and_switch():
    router = sparsity(until=10, early=[6, 4])
    kept = {
        (layer, step): router(
            hidden(), RouterContext(1, T, layer=layer, step=step, training=True)
        ).top_k
        for layer in range(3)
        for step in (0, 9, 10)
    }
    before = {0: 6, 1: 4, 2: K}
    assert kept == {(layer, step): K if step == 10 else before[layer] for layer, step in kept}


def test_evaluation_uses_what_was_trained_last_also_after_loading():
    router = sparsity(until=10, early=[6])
    router(hidden(), RouterContext(1, T, step=3, training=True))
    assert router(hidden(), RouterContext(1, T)).top_k == 6
    keys = set(router.state_dict())
    router(hidden(), RouterContext(1, T, step=10, training=True))
    assert router(hidden(), RouterContext(1, T)).top_k == K
    assert set(router.state_dict()) == keys
    loaded = sparsity(until=10, early=[6])
    loaded.load_state_dict(router.state_dict())
    assert loaded(hidden(), RouterContext(1, T)).top_k == K


def test_a_constant_table_is_plain_top_k():
    router = sparsity(until=10, early=[K] * 4)
    assert same(router(hidden(), RouterContext(1, T, training=True)), plain(router.score.weight))


def test_numbers_of_early_experts_are_checked():
    with pytest.raises(UserError, match="early: 9 of layer 1"):
        sparsity(until=10, early=[4, 9])


def test_candidates_grow_linearly_between_the_two_steps():
    counts = [candidate_count(step, 10, 30, 2, 8) for step in (0, 10, 15, 20, 29, 30, 99)]
    assert counts == [2, 2, 3, 5, 7, 8, 8]


def test_only_candidates_are_chosen_one_draw_for_a_step_and_layer():
    router = build_router("rexmoe", D, E, K, candidates=3, start=5, end=10)
    seen = set()
    for step in range(6):
        parts = [
            router(hidden(), RouterContext(1, T, step=step, part=part, training=True))
            for part in range(2)
        ]
        assert torch.equal(parts[0].expert, parts[1].expert)
        chosen = frozenset(parts[0].expert.tolist())
        assert len(chosen) <= 3
        seen.add(chosen)
    assert len(seen) > 1
    # Scores are those of the whole pool: what is masked is the choice.
    assert (parts[0].scores > 0).all()


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        ({}, {"training": True}),
        ({"candidates": 3, "start": 0, "end": 4}, {"training": True, "step": 4}),
        ({"candidates": 3}, {}),
    ],
)
def test_with_all_candidates_it_is_plain_top_k(options, fields):
    router = build_router("rexmoe", D, E, K, **options)
    assert same(router(hidden(), RouterContext(1, T, **fields)), plain(router.score.weight))


def test_candidates_below_top_k_are_told():
    with pytest.raises(UserError, match="candidates 1"):
        build_router("rexmoe", D, E, K, candidates=1)


def elastic(**options):
    torch.manual_seed(0)
    return build_router("elastic", D, E, K, **options)


def test_the_full_draw_is_the_plain_router_bit_for_bit():
    router = elastic(full=1.0, bias_rate=0.0)
    assert same(
        router(hidden(), RouterContext(1, T, training=True)), plain(router.score.linear.weight)
    )


def test_a_draw_holds_for_all_layers_of_a_step_and_all_numbers_come():
    router = elastic(full=0.3, experts=[4, 8], top_ks=[1, 2])
    drawn = set()
    for step in range(60):
        routings = [
            router(hidden(), RouterContext(1, T, step=step, layer=layer, training=True))
            for layer in range(2)
        ]
        assert routings[0].top_k == routings[1].top_k
        kept = (routings[0].scores > 0).sum(1)
        assert (kept == kept[0]).all()
        assert (routings[0].expert < kept[0]).all()
        drawn.add((int(kept[0]), routings[0].top_k))
    assert drawn == {(4, 1), (4, 2), (8, 1), (8, 2)}


def test_a_cut_out_router_equals_the_masked_one():
    router = elastic(eval_experts=4, eval_top_k=1, bias_rate=0.01)
    router.terms._modules["0"].expert_bias.copy_(torch.linspace(-0.1, 0.3, E))
    cut = build_router("softmax-raw", D, 4, 1)
    cut.score.weight = torch.nn.Parameter(router.score.linear.weight[:4])
    masked = router(hidden(), RouterContext(1, T))
    whole = cut(hidden(), RouterContext(1, T))
    torch.testing.assert_close(masked.scores[:, :4], whole.scores)
    # The bias lifts dropped experts most; they are not chosen all the same.
    assert (masked.expert < 4).all()


def test_the_bias_moves_kept_experts_only_by_their_own_balance():
    router = elastic(full=0.0, experts=[4], top_ks=[2], bias_rate=0.1)
    router(hidden(), RouterContext(1, T, training=True))
    router.after_step(torch.tensor([20.0, 12.0, 16.0, 16.0, 0, 0, 0, 0]))
    bias = router.terms._modules["0"].expert_bias
    torch.testing.assert_close(bias, torch.tensor([-0.1, 0.1, 0, 0, 0, 0, 0, 0]))


def test_numbers_beyond_the_full_model_are_told():
    with pytest.raises(UserError, match="experts"):
        elastic(experts=[4, 9])
    with pytest.raises(UserError, match="eval_top_k 2 exceeds eval_experts 1"):
        elastic(eval_experts=1)
