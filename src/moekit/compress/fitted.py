"""From a plan's `fit` to the rewrite that computes its values."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moekit.core.errors import UserError
from moekit.core.plan import ExpertPlan
from moekit.core.registry import registry

if TYPE_CHECKING:
    from moekit.core.rewrite import Rewrite
    from moekit.core.stats import ExpertStats

# Kinds whose methods compute values: called as method(plan, stats, model=directory, **options),
# they return a `core.rewrite.Rewrite`. `stats` is None where the plan names none.
KINDS = ("condenser", "fuser", "quantizer", "factorizer", "sparsifier")


def rewrite_of(plan: ExpertPlan, model: Path, stats: ExpertStats | None = None) -> Rewrite | None:
    """The rewrite that `plan.fit` names, None for a plan without one.

    `model` is the directory of the original model; `stats` takes the place of the ones that the
    plan names by directory. Raises `UserError` for a method that is unknown or lacks its stats.
    """
    if plan.fit is None:
        return None
    method = next(
        (m for kind in KINDS for m in registry.methods(kind=kind) if m.name == plan.fit.method),
        None,
    )
    if method is None:
        raise UserError(
            f"the plan's values are computed by {plan.fit.method!r}, which is no "
            f"{' or '.join(KINDS)} that moekit has (`moekit list`)"
        )
    if stats is None and plan.fit.stats is not None:
        from moekit.core.stats import ExpertStats

        stats = ExpertStats.open(plan.fit.stats)
    if stats is None and "data" in method.needs:
        raise UserError(
            f"{plan.fit.method} needs the stats it was planned with, and the plan names none; give "
            "--stats"
        )
    try:
        made: Rewrite = method.load()(plan, stats, model=model, **plan.fit.options)
    except TypeError as error:
        raise UserError(f"the plan's options of {plan.fit.method} do not fit: {error}") from None
    return made
