"""Routers by noise level or timestep, tables of routes, and the mask by task."""

import math

import pytest
import torch

from moekit.core.errors import UserError
from moekit.layers import (
    ExpertPool,
    MoELayer,
    RouterContext,
    Routing,
    build_bank,
    build_router,
)
from moekit.layers.route_table import precompute
from moekit.layers.routers.keyed import weight_load_loss
from moekit.layers.task_mask import TaskMask, diffusion_prior_loss, matched_prior, prior_map

D, DK, E, K, T = 16, 8, 6, 2, 12


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def router(name: str, top_k: int = K, **options):
    torch.manual_seed(1)
    made = build_router(name, D, E, top_k, key_width=DK, **options)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made


@pytest.mark.parametrize("name", ["mode", "switch-dit"])
def test_the_route_depends_on_the_key_and_not_on_the_tokens(name):
    made, key = router(name), random(T, DK)
    first = made(random(T, D), RouterContext(1, T, key=key))
    other = made(random(T, D, seed=5), RouterContext(1, T, key=key))
    assert torch.equal(first.expert, other.expert)
    assert torch.equal(first.weight, other.weight)
    moved = made(random(T, D), RouterContext(1, T, key=random(T, DK, seed=9)))
    assert not torch.equal(first.expert, moved.expert)


def test_training_draws_without_replacement_in_proportion_to_the_scores():
    made, trials = router("mode", top_k=1), 4000
    key = random(1, DK).expand(trials, DK)
    context = RouterContext(1, trials, key=key, training=True)
    routing = made(random(trials, D), context)
    share = torch.bincount(routing.expert, minlength=E) / trials
    # Four standard deviations of a share of so many draws.
    assert (share - routing.scores[0]).abs().max() < 4 * (0.25 / trials) ** 0.5
    pairs = router("mode")(random(T, D), RouterContext(1, T, key=random(T, DK), training=True))
    ids, weights = pairs.topk()
    assert (ids[:, 0] != ids[:, 1]).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(T))


def test_all_experts_are_the_soft_mixture():
    routing = router("mode", top_k=E)(random(T, D), RouterContext(1, T, key=random(T, DK)))
    ids, weights = routing.topk()
    torch.testing.assert_close(weights, routing.scores.gather(1, ids))


def test_the_load_loss_on_weights_is_top_k_at_balance_and_more_off_it():
    ids = torch.arange(T)[:, None] % E
    ids = torch.cat([ids, (ids + 1) % E], 1)
    half = torch.full((T, 2), 0.5)
    even = weight_load_loss(Routing.from_topk(ids, half, E))
    assert even.item() == pytest.approx(weight_load_loss.at_balance(E, K), rel=1e-6)
    mask = torch.arange(T) < 6
    padded = weight_load_loss(Routing.from_topk(ids, half, E, token_mask=mask))
    assert padded.item() == pytest.approx(K, rel=1e-6)
    one = weight_load_loss(Routing.from_topk(0 * ids[:, :1], torch.ones(T, 1), E))
    assert one.item() == pytest.approx(E, rel=1e-6)


def test_a_table_repeats_the_routes_and_its_fused_experts_the_layer():
    made, bank = router("mode"), build_bank("swiglu", D, E, expert_width=8)
    keys = random(5, DK)
    table = precompute(made, keys)
    index = torch.arange(T) % 5
    context = RouterContext(1, T, key=keys[index], token_type=index)
    live, looked_up = made(random(T, D), context), table(random(T, D), context)
    assert torch.equal(live.expert, looked_up.expert)
    assert torch.equal(live.weight, looked_up.weight)
    x = random(1, T, D)
    routed = MoELayer(table, ExpertPool([bank]))(x, context)
    for key in range(5):
        fused = table.fuse(bank, key)
        assert fused.down.shape == (D, K * 8)
        # The same products, summed in one matrix instead of two.
        torch.testing.assert_close(
            fused(x[0, index == key]), routed[0, index == key], rtol=1e-4, atol=1e-6
        )


def test_a_table_refuses_unknown_keys_and_routers_of_tokens():
    table = precompute(router("switch-dit"), random(3, DK))
    with pytest.raises(UserError, match="0 to 3"):
        table(random(4, D), RouterContext(1, 4, token_type=torch.arange(4)))
    with pytest.raises(UserError, match="token_type"):
        table(random(4, D), RouterContext(1, 4))
    with pytest.raises(UserError, match="TernaryExperts do not fuse"):
        table.fuse(build_bank("ternary", D, E, expert_width=8), 0)
    with pytest.raises(UserError, match="key by key"):
        precompute(build_router("expert-choice", D, E, K), random(3, D))


def task_mask() -> TaskMask:
    torch.manual_seed(2)
    return TaskMask(D, 3, 2)


def block(x: torch.Tensor) -> torch.Tensor:
    return x + torch.tanh(x.cumsum(1))


def test_the_mask_starts_as_the_plain_block():
    x = random(4, 5, D)
    assert torch.equal(task_mask()(block, x, random(4, D, seed=1)), block(x))


def test_a_trained_mask_depends_on_the_timestep_alone_and_can_be_computed_beforehand():
    mask, keys = task_mask(), random(6, D)
    for parameter in mask.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    index = torch.tensor([2, 2, 5])
    routes, masks = mask.table(keys)
    assert routes.num_keys == 6
    live = mask.mask(keys[index])
    assert torch.equal(live[0], live[1])
    # A batch of three or of six rows: the same sums in other kernels.
    torch.testing.assert_close(live, masks[index])
    x = random(3, 5, D, seed=3)
    expected = block(x * live[:, None]) + (1 - live[:, None]) * x
    torch.testing.assert_close(mask(block, x, keys[index]), expected)


def test_prior_rows_are_windows_that_overlap_less_the_further_apart():
    prior = prior_map(100, 24, 2 / 3)
    assert (prior.sum(1) == 16).all()
    overlap = prior[-1] @ prior.T
    assert (overlap.diff() >= 0).all()
    assert overlap[0] < overlap[-2]
    with pytest.raises(UserError, match="no unit"):
        prior_map(10, 4, 0.1)


def test_the_prior_loss_is_zero_at_the_matched_prior_and_below_log_2():
    prior = prior_map(40, 6, 0.5)
    shuffled = prior[:, torch.randperm(6, generator=torch.Generator().manual_seed(0))]
    gates = (shuffled / 3).unsqueeze(1)
    assert torch.equal(matched_prior(gates, prior, 3), shuffled)
    # Rounding of a logarithm next to one.
    assert abs(diffusion_prior_loss(gates, top_k=3).item()) < 1e-6
    far = torch.zeros(40, 2, 3)
    far[..., 0] = 1.0
    loss = float(diffusion_prior_loss(far, top_k=1))
    assert 0 < loss <= math.log(2)


def test_the_prior_loss_trains_the_gates_of_all_timesteps():
    torch.manual_seed(0)
    masks = [TaskMask(D, 3, 2) for _ in range(2)]
    keys = random(32, D)
    optimizer = torch.optim.Adam([p for m in masks for p in m.router.parameters()], lr=0.03)
    losses = []
    for _ in range(60):
        loss = diffusion_prior_loss(torch.stack([m.gates(keys) for m in masks], 1), top_k=2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
