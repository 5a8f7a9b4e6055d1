"""`--protect` of the verbs of `moekit compress`: experts that a plan must leave alone."""

from __future__ import annotations

from pathlib import Path

from moekit.core.errors import UserError


def protected_experts(texts: list[str]) -> dict[int, set[int]]:
    """Experts by decoder layer from LAYER:EXPERT, as 3:17, and from files of plans.

    Raises `UserError` for what is neither.
    """
    found: dict[int, set[int]] = {}
    for text in texts:
        layer, colon, expert = text.partition(":")
        if colon and layer.isdigit() and expert.isdigit():
            found.setdefault(int(layer), set()).add(int(expert))
        elif Path(text).exists():
            from moekit.core.plan import ExpertPlan

            for index, actions in ExpertPlan.load(text).layers.items():
                found.setdefault(index, set()).update(e for e, a in actions.items() if a.protect)
        else:
            raise UserError(f"--protect {text!r} is neither a plan's file nor LAYER:EXPERT as 3:17")
    return found
