"""The trainer's step on families of different routing and storage."""

import pytest
import torch

from moekit.core.errors import UserError
from moekit.layers import RouterContext
from moekit.train.balance import family_balance, move_bias
from moekit.train.model import tap_routers
from moekit.train.optim import build_optimizers
from moekit.train.recipe import BalanceRecipe, OptimRecipe, TrainRecipe
from moekit.train.step import build_losses, run_step
from tests.families.tiny import build_tiny

# family: whether it balances by a loss (its config declares the coefficient) or by a bias.
FAMILIES = {
    "mixtral": "loss",
    "qwen2_moe": "loss",
    "olmoe": "loss",
    "granitemoe": "loss",
    "gpt_oss": "loss",
    "jamba": "loss",
    "deepseek_v3": "bias",
    "glm4_moe": "bias",
    "nemotron_h": "bias",
}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_few_steps_learn_a_batch(family: str, optimizer: str) -> None:
    model = build_tiny(family).train()
    tap = tap_routers(model)
    balance = family_balance(BalanceRecipe(), model.config, bool(tap.biases))
    assert (balance.coefficient > 0, balance.bias_rate > 0) == (
        FAMILIES[family] == "loss",
        FAMILIES[family] == "bias",
    )
    recipe = OptimRecipe(name=optimizer, lr=3e-3, embedding_lr=3e-3, muon_lr=0.01)
    optimizers = build_optimizers(model, recipe, tap.router_names, tap.fused_names)
    losses = build_losses(model, tap, balance, TrainRecipe(precision="fp32"))
    windows = torch.randint(128, (2, 17), generator=torch.Generator().manual_seed(0))
    before = [bias.clone() for bias in tap.biases]
    found = []
    for _ in range(6):
        result = run_step(losses, windows, micro=1)
        for part in optimizers:
            part.step()
            part.zero_grad()
        if balance.bias_rate:
            move_bias(tap.biases, result.counts, balance.bias_rate)
        found.append(result.loss)
    assert found[-1] < found[0] - 0.05
    top_k = int(result.counts[0].sum()) // 32
    assert top_k >= 1
    assert all(int(counts.sum()) == 32 * top_k for counts in result.counts)
    assert all(not torch.equal(a, b) for a, b in zip(before, tap.biases, strict=True))


def test_a_family_without_separate_routing_is_refused_by_name() -> None:
    model = build_tiny("zaya").train()
    tap = tap_routers(model)
    losses = build_losses(
        model, tap, family_balance(BalanceRecipe(), model.config, False), TrainRecipe()
    )
    with pytest.raises(UserError, match="does not return"):
        losses(torch.zeros(1, 9, dtype=torch.long), RouterContext(1, 8))
