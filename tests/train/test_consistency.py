"""THOR's objective in the trainer: two passes with experts of their own draw."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from moekit.core.errors import UserError
from moekit.layers import RouterContext
from moekit.layers.routers.stochastic import consistency_loss
from moekit.train.balance import BalanceRules
from moekit.train.model import tap_routers
from moekit.train.recipe import TrainRecipe, recipe_from_dict
from moekit.train.step import build_losses
from tests.train.test_balance import tiny_model, windows

NOTHING = BalanceRules((), 0.0, True)


def objective(model, consistency: float, ids: torch.Tensor, context: RouterContext):
    recipe = TrainRecipe(precision="fp32", consistency=consistency)
    return build_losses(model, tap_routers(model), NOTHING, recipe)(ids, context)


def test_the_objective_is_both_cross_entropies_and_the_divergence() -> None:
    model, ids = tiny_model("thor").float(), windows()
    context = RouterContext(len(ids), ids.shape[1] - 1, step=3, part=2)
    total, reported, _, records = objective(model, 5.0, ids, context)
    passes = [
        model(ids[:, :-1], router_context=dataclasses.replace(context, part=part))
        for part in (2, -3)
    ]
    assert not torch.equal(passes[0].routings[0].expert, passes[1].routings[0].expert)
    assert torch.equal(records[0].expert, passes[0].routings[0].expert)
    nats = [F.cross_entropy(p.logits.flatten(0, 1), ids[:, 1:].flatten()) for p in passes]
    divergence = consistency_loss(passes[0].logits, passes[1].logits) / ids[:, 1:].numel()
    torch.testing.assert_close(reported, nats[0].detach())
    torch.testing.assert_close(total, (nats[0] + nats[1] + 5.0 * divergence) / 2)


def test_passes_that_agree_are_worth_one() -> None:
    model, ids = tiny_model("softmax-raw").float(), windows()
    context = RouterContext(len(ids), ids.shape[1] - 1)
    once, _, _, _ = objective(model, 0.0, ids, context)
    twice, _, _, _ = objective(model, 5.0, ids, context)
    assert torch.equal(once, twice)


def test_a_negative_weight_is_told() -> None:
    with pytest.raises(UserError, match=r"train.consistency is -1"):
        recipe_from_dict(
            {"name": "x", "model": {"model_type": "qwen3_moe"}, "train": {"consistency": -1.0}}
        )
