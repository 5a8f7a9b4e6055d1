"""Which balance rules a run trains with: its recipe's, or those that the family uses itself."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moekit.core.errors import UserError
from moekit.layers import MoekitConfig
from moekit.layers.balance import Balance, Schedule

from .recipe import BalanceRecipe

Sum = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class BalanceRules:
    """The rules in force: `losses` added to the objective, and the step `bias_rate` of a stock
    family's correction bias (0: it stays). `lenient` leaves out routers without scores, which
    nobody asked to balance."""

    losses: tuple[Balance, ...]
    bias_rate: float
    lenient: bool

    def after_step(self) -> None:
        """Tell every loss that an optimiser step is done."""
        for loss in self.losses:
            loss.after_step()


def balance_rules(
    recipe: BalanceRecipe,
    config: Any,
    has_bias: bool,
    self_balanced: bool = False,
    sum_over_processes: Sum | None = None,
) -> BalanceRules:
    """The rules for a model: its family's own, unless the recipe says otherwise.

    A family with a correction bias is balanced by moving it; one whose config declares
    `router_aux_loss_coef` by the loss; any other, one whose routers are `self_balanced`, and one
    whose recipe lists losses, is left alone.
    """
    declared = getattr(config, "router_aux_loss_coef", None)
    rule = recipe.rule
    if isinstance(config, MoekitConfig) and rule == "bias":
        raise UserError(
            "balance.rule is 'bias', but moekit's routers carry their own: choose one with a "
            "bias_rate, such as loss-free, and balance.rule 'none'."
        )
    if rule == "family" and (self_balanced or recipe.losses):
        rule = "none"
    elif rule == "family":
        rule = "bias" if has_bias else "loss" if declared is not None else "none"
    if rule == "bias" and not has_bias:
        raise UserError(
            f"balance.rule is 'bias', but {config.model_type} has no correction bias; use 'loss'."
        )
    listed = list(recipe.losses)
    if rule == "loss":
        weight = recipe.coefficient if recipe.coefficient is not None else declared or 0.0
        listed.append({"name": "balance-loss", "weight": weight, "scope": recipe.scope})
    if recipe.z_loss:
        listed.append({"name": "z-loss", "weight": recipe.z_loss})
    losses = tuple(balance_loss_of(entry, sum_over_processes) for entry in listed)
    bias_rate = recipe.bias_rate if rule == "bias" else 0.0
    return BalanceRules(losses, bias_rate, lenient=recipe.rule == "family" and not recipe.losses)


def balance_loss_of(entry: dict[str, Any], sum_over_processes: Sum | None = None) -> Balance:
    """The `Balance` of an entry of `balance.losses`.

    `name` and `weight`; `scope`; a schedule of `begin`, `end` (fractions of the run) and `last`;
    what is left are options of the loss. Raises UserError for anything that does not fit.
    """
    options = dict(entry)
    missing = [field for field in ("name", "weight") if field not in options]
    if missing:
        raise UserError(f"an entry of balance.losses lacks {' and '.join(missing)}: {entry}")
    names = [name for name in ("begin", "end", "last") if name in options]
    timed: dict[str, Any] = {name: options.pop(name) for name in names}
    for field, value in {"weight": options["weight"], **timed}.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UserError(f"{field} of balance loss {entry['name']!r} is {value!r}, not a number")
    return Balance(
        options.pop("name"),
        weight=options.pop("weight"),
        scope=options.pop("scope", "micro"),
        schedule=Schedule(**timed),
        sum_over_processes=sum_over_processes,
        **options,
    )
