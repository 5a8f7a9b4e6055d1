"""The trainer's step on families of different routing and storage."""

import functools

import pytest
import torch

from moekit.core.errors import UserError
from moekit.layers import RouterContext
from moekit.layers.balance import move_bias
from moekit.train.balance import balance_rules
from moekit.train.model import tap_routers
from moekit.train.optim import build_optimizers
from moekit.train.recipe import BalanceRecipe, OptimRecipe, TrainRecipe
from moekit.train.step import build_losses, run_step
from tests.families.tiny import build_tiny
from tests.train.test_balance import tiny_model

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
    balance = balance_rules(BalanceRecipe(), model.config, bool(tap.biases))
    assert (bool(balance.losses), balance.bias_rate > 0) == (
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
            for bias, counts in zip(tap.biases, result.counts, strict=True):
                move_bias(bias, counts, balance.bias_rate)
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
        model, tap, balance_rules(BalanceRecipe(), model.config, False), TrainRecipe()
    )
    with pytest.raises(UserError, match="does not return"):
        losses(torch.zeros(1, 9, dtype=torch.long), RouterContext(1, 8))


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
def test_recomputation_changes_no_gradient(family: str) -> None:
    windows = torch.randint(128, (2, 17), generator=torch.Generator().manual_seed(0))
    found = []
    for recompute in (False, True):
        model = build_tiny(family).train()
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        tap = tap_routers(model)
        rules = balance_rules(BalanceRecipe(z_loss=0.1), model.config, bool(tap.biases))
        losses = build_losses(model, tap, rules, TrainRecipe(precision="fp32"))
        result = run_step(losses, windows, micro=1)
        grads = [param.grad for param in model.parameters() if param.grad is not None]
        found.append((result.loss, result.counts, grads))
    plain, again = found
    assert plain[0] == again[0]
    assert all(torch.equal(a, b) for a, b in zip(plain[1], again[1], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(plain[2], again[2], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2_moe", "moekit"])
def test_a_compiled_step_is_one_graph_and_gives_the_same(name, monkeypatch) -> None:
    # Without code generation, which is torch's own business.
    compiler = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", compiler)
    windows = torch.randint(64, (4, 13), generator=torch.Generator().manual_seed(0))
    found = []
    for compiled in (False, True):
        model = tiny_model().float() if name == "moekit" else build_tiny(name).train()
        tap = tap_routers(model)
        rules = balance_rules(BalanceRecipe(rule="loss", coefficient=0.1), model.config, False)
        losses = build_losses(model, tap, rules, TrainRecipe(precision="fp32", compile=compiled))
        result = run_step(losses, windows, micro=2)
        found.append((result, [p.grad for p in model.parameters() if p.grad is not None]))
    (plain, grads), (fast, others) = found
    assert fast.loss == pytest.approx(plain.loss, abs=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(plain.counts, fast.counts, strict=True))
    for ours, theirs in zip(others, grads, strict=True):
        # Gradients of at most about 1, some summed in another order.
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
