"""The leverage law against the values of its paper, and the planner that uses it."""

import math

import pytest
import yaml

from moekit.core.errors import UserError
from moekit.train.design import ACTIVE, plan_for, recipe_of
from moekit.train.leverage import (
    BEST_GRANULARITY,
    dense_allocation,
    efficiency_leverage,
    moe_allocation,
)
from moekit.train.recipe import load_recipe, recipe_from_dict

# Granularity 12; activation 1/128, 1/64, ..., 1/2.
TABLE = {
    1e20: (6.36, 5.54, 4.54, 3.53, 2.64, 1.93, 1.39),
    1e22: (11.22, 9.35, 7.22, 5.20, 3.56, 2.36, 1.54),
    1e24: (19.78, 15.79, 11.48, 7.66, 4.80, 2.89, 1.70),
}


@pytest.mark.parametrize("flops", TABLE)
def test_the_law_gives_the_values_of_its_paper(flops) -> None:
    found = [efficiency_leverage(2.0**-power, 12, flops) for power in range(7, 0, -1)]
    # Two decimals are printed.
    assert found == pytest.approx(TABLE[flops], abs=0.006)


def test_ling_mini_beta_has_more_than_seven_times_leverage() -> None:
    assert efficiency_leverage(13 / 384, 12, 1e22) == pytest.approx(6.97, abs=0.006)
    assert efficiency_leverage(0.031, 12, 1e22) == pytest.approx(7.245, abs=0.01)


def test_its_shape() -> None:
    by_activation = [efficiency_leverage(a / 128, 12, 1e21) for a in range(1, 129)]
    assert by_activation == sorted(by_activation, reverse=True)
    by_compute = [efficiency_leverage(1 / 32, 12, 10**e) for e in range(17, 25)]
    assert by_compute == sorted(by_compute)
    best = max(range(2, 64), key=lambda g: efficiency_leverage(1 / 32, g, 1e21))
    assert best == round(BEST_GRANULARITY) == 11
    assert math.log2(BEST_GRANULARITY) == pytest.approx(3.503, abs=1e-3)
    # The paper says 1; its formula gives a little less.
    assert 0.99 <= efficiency_leverage(1.0, 12, 1e20) <= 0.995


def test_allocations_spend_the_budget() -> None:
    for flops in (1e18, 1e20):
        bought, (dense_flops, dense_tokens) = moe_allocation(flops), dense_allocation(flops)
        # The coefficients are printed to four digits.
        assert bought.flops_per_token * bought.tokens == pytest.approx(flops, rel=1e-3)
        assert dense_flops * dense_tokens == pytest.approx(flops, rel=1e-3)


@pytest.mark.parametrize("wrong", [(0.0, 12, 1e20), (1.5, 12, 1e20), (0.5, 0, 1e20)])
def test_values_outside_of_the_law_are_refused(wrong) -> None:
    with pytest.raises(ValueError, match="activation"):
        efficiency_leverage(*wrong)


def test_a_plan_names_designs_for_loss_and_for_reasoning() -> None:
    plan = plan_for(1e20)
    leverage = [design.leverage for design in plan.designs]
    assert leverage == sorted(leverage)
    assert plan.for_loss == len(plan.designs) - 1
    ratios = [design.tokens_per_parameter for design in plan.designs]
    assert ratios[plan.for_reasoning] == min(ratios, key=lambda ratio: abs(ratio - 20))
    for design in plan.designs:
        used = design.top_k + design.shared
        assert used == ACTIVE
        assert used / (design.num_experts + design.shared) == design.activation
        assert design.expert_width % 8 == 0
        assert design.width % 64 == 0
    # One shared expert in twelve from here on, two below.
    assert {design.shared for design in plan.designs} == {1}
    assert {design.shared for design in plan_for(1e19).designs} == {2}


def test_its_compute_a_token_is_what_the_budget_buys() -> None:
    for flops in (1e19, 1e21):
        plan = plan_for(flops, seq_len=4096)
        design = plan.designs[0]
        spent = 6 * design.active_parameters + 6 * design.layers * design.width * 4096
        assert spent == pytest.approx(plan.allocation.flops_per_token, rel=0.35)


def test_memory_leaves_denser_designs_and_ranges_are_said() -> None:
    whole, small = plan_for(1e19), plan_for(1e19, max_bytes=10e9)
    assert 0 < len(small.designs) < len(whole.designs)
    assert all(design.training_bytes <= 10e9 for design in small.designs)
    assert not any("outside" in warning for warning in whole.warnings)
    assert any("outside" in warning for warning in plan_for(1e23).warnings)
    with pytest.raises(UserError, match="GB"):
        plan_for(1e22, max_bytes=1e9)
    with pytest.raises(UserError, match="plan-for"):
        plan_for(0)


def test_the_recipe_of_a_design_is_a_model_of_its_parameters() -> None:
    import torch

    from moekit.layers import MoekitConfig, MoekitForCausalLM

    plan = plan_for(1e18)
    design = plan.designs[2]
    recipe = recipe_from_dict(recipe_of(plan, 2, "x"))
    arguments = {key: value for key, value in recipe.model.items() if key != "model_type"}
    with torch.device("meta"):
        model = MoekitForCausalLM(MoekitConfig(vocab_size=64, **arguments))
    ends = 2 * 64 * design.width
    routers = sum(layer.router.score.weight.numel() for layer in model.moe_layers())
    found = sum(p.numel() for p in model.parameters()) - ends - routers
    # Norms are left out of the plan.
    assert found == pytest.approx(design.parameters, rel=1e-3)


def test_from_the_command_line(moekit, tmp_path) -> None:
    out = tmp_path / "recipe.yaml"
    done = moekit("train", "--plan-for", "1e18", "--aim", "reasoning", "--out", out, "--json")
    assert done.code == 0, done.err
    recipe = yaml.safe_load(out.read_text())
    chosen = done.json["designs"][done.json["for_reasoning"]]
    assert recipe["model"]["moe"]["experts"]["count"] == chosen["num_experts"]
    assert load_recipe(out).steps > 1
    assert moekit("train", "--plan-for", "1e18").out.count("top-10") == 7
    refused = moekit("train", "--plan-for", "1e18", "--aim", "speed")
    assert refused.code == 2
    assert "reasoning" in refused.err
    missing = moekit("train")
    assert missing.code == 2
    assert "RECIPE" in missing.err
