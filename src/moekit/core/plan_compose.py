"""Composition of two `ExpertPlan`s: actions, neuron orders and router edits of the first model."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from moekit.core.errors import UserError
from moekit.core.plan import Action, ExpertPlan
from moekit.core.plan_tensors import PlanTensors

if TYPE_CHECKING:
    from torch import Tensor


def compose(first: ExpertPlan, later: ExpertPlan) -> ExpertPlan:
    """One plan that equals `first` followed by `later`; see `core.plan` for the rules.

    Raises `UserError` where `later` is for another model than `first` leaves, drops what `first`
    protects, or where no single plan can say the same.
    """
    left = first.result()
    if left is not None and later.model is not None and left != later.model:
        raise UserError(
            f"The second plan is for {later.model.describe()}; the first leaves {left.describe()}."
        )
    _check_fits(first, later)
    model = first.model
    if model is None and later.model is not None and not _reduces(first):
        model = later.model
    indices = sorted({*_layers(first), *_layers(later)})
    layers = {index: _compose_layer(index, first, later) for index in indices}
    neurons: dict[tuple[int, int], Tensor] = {}
    for index in indices:
        neurons |= _compose_neurons(index, first, later)
    routers, maps = {}, {}
    for index in indices:
        kind, matrix = _compose_router(index, first, later)
        if kind is not None:
            routers[index] = kind
        if matrix is not None:
            maps[index] = matrix
    note = "; ".join(part for part in (first.note, later.note) if part)
    values = {**first.tensors.values, **later.tensors.values}
    fit = (first if later.fit is None else later).tensors.fit
    tensors = PlanTensors(neurons, maps, values, fit)
    return ExpertPlan(layers, model, note, routers, tensors, later.fit or first.fit)


def _layers(plan: ExpertPlan) -> set[int]:
    with_neurons = {layer for layer, _ in plan.tensors.neurons}
    return {*plan.layers, *plan.routers, *with_neurons}


def _reduces(plan: ExpertPlan) -> bool:
    return bool({"drop", "group"} & set(plan.uses())) or "linear" in plan.routers.values()


def _check_fits(first: ExpertPlan, later: ExpertPlan) -> None:
    acts = set(later.uses()) - {"protect"}
    if later.fit is not None and (set(first.uses()) - {"protect"} or first.fit or first.tensors):
        raise UserError(
            f"The second plan is fitted ({later.fit.method}) to the model that the first one "
            "leaves. Apply the first plan, and make the second one for its result."
        )
    if first.fit is not None and acts - {"drop"}:
        raise UserError(
            f"The first plan is fitted ({first.fit.method}); only dropping experts can be added "
            f"to it, and the second plan has {', '.join(sorted(acts))}. Apply the first plan, then "
            "the second one to its result."
        )
    if first.tensors.values and _reduces(later):
        raise UserError(
            f"The first plan replaces {next(iter(first.tensors.values))}, and the second one "
            "changes the number of experts. Apply the first plan, then the second to its result."
        )


def _reach(index: int, *plans: ExpertPlan) -> int:
    """Ids beyond every one that is mentioned are not moved by anything in between."""
    total = 0
    for plan in plans:
        mentioned = [*plan.layers.get(index, {})]
        mentioned += [e for layer, e in plan.tensors.neurons if layer == index]
        total += 1 + max(mentioned, default=-1)
    return total


def _compose_layer(index: int, first: ExpertPlan, later: ExpertPlan) -> dict[int, Action]:
    """Actions on the ids of `first`'s model, from `later`'s on the ids of its result."""
    reach = _reach(index, first, later)
    survivors = first.survivors(index, reach)
    slot = {expert: number for number, expert in enumerate(survivors)}
    made: dict[int, Action] = {}
    for expert in range(reach):
        before = first.action(index, expert)
        if before.drop:
            made[expert] = before
            continue
        leader = expert if before.group is None else before.group
        after = later.action(index, slot[leader])
        if after.drop:
            if before.protect:
                raise UserError(
                    f"Layer {index}: the second plan drops expert {slot[leader]}, which holds "
                    f"expert {expert} that the first plan protects."
                )
            made[expert] = Action(drop=True)
            continue
        if leader != expert:
            # Of a group the lowest member holds what belongs to the result.
            lead = first.action(index, leader)
            before = dataclasses.replace(before, bits=lead.bits, rank=lead.rank, width=lead.width)
        made[expert] = _compose_action(before, after, survivors)
    return made


def _compose_action(before: Action, after: Action, survivors: list[int]) -> Action:
    protect = before.protect or after.protect
    if after.group is not None:
        weight = (1.0 if before.weight is None else before.weight) * (after.weight or 0.0)
        group = survivors[after.group]
        return dataclasses.replace(after, group=group, weight=weight, protect=protect)
    return dataclasses.replace(
        before,
        bits=before.bits if after.bits is None else after.bits,
        rank=before.rank if after.rank is None else after.rank,
        width=min((w for w in (before.width, after.width) if w is not None), default=None),
        protect=protect,
    )


def _compose_neurons(
    index: int, first: ExpertPlan, later: ExpertPlan
) -> dict[tuple[int, int], Tensor]:
    import torch

    reach = _reach(index, first, later)
    slot = {e: number for number, e in enumerate(first.survivors(index, reach))}
    made = {}
    for expert in range(reach):
        action = first.action(index, expert)
        if action.drop:
            continue
        leader = expert if action.group is None else action.group
        after = later.action(index, slot[leader])
        if after.drop:
            continue
        order = first.tensors.neurons.get((index, expert))
        then = later.tensors.neurons.get((index, slot[leader]))
        width = first.action(index, leader).width
        if width is not None and (then is not None or after.group is not None):
            # What the second plan sees is already cut.
            order = torch.arange(width) if order is None else order[:width]
        if then is not None and order is not None:
            order = order[then[then < len(order)]]
        order = then if order is None else order
        if order is not None:
            made[index, expert] = order
    return made


def _compose_router(
    index: int, first: ExpertPlan, later: ExpertPlan
) -> tuple[str | None, Tensor | None]:
    """The edit, None for slicing, and the matrix of a linear one."""
    one, two = first.router(index), later.router(index)
    maps = first.tensors.router_maps.get(index), later.tensors.router_maps.get(index)
    if not _edits(index, later):
        return first.routers.get(index), maps[0]
    if not _edits(index, first):
        return later.routers.get(index), maps[1]
    folds = bool(first.groups(index)), bool(later.groups(index))
    if one == two and one in ("slice", "alias"):
        return first.routers.get(index), None
    if one != "linear" and not folds[0]:
        if two != "linear":
            return later.routers.get(index), None
    elif two == "slice" and not folds[1] and one != "linear":
        return first.routers.get(index), None
    if "alias" in (one, two):
        raise UserError(
            f"Layer {index}: the router edits {one} and then {two} are no single edit. Apply the "
            "first plan, then the second one to its result."
        )
    count = first.num_experts(index)
    if count is None:
        raise UserError(
            f'Layer {index}: the router edits {one} and then {two} need "model" in the first plan, '
            "for the number of experts."
        )
    matrix = router_matrix(first, index, count)
    return "linear", router_matrix(later, index, len(matrix)) @ matrix


def _edits(index: int, plan: ExpertPlan) -> bool:
    return plan.router(index) == "linear" or bool(plan.dropped(index)) or bool(plan.groups(index))


def router_matrix(plan: ExpertPlan, index: int, num_experts: int) -> Tensor:
    """The router edit of a layer as a map [r, E] of router rows, float64; not for "alias".

    "mean" weighs the rows of a group as its experts, to a sum of 1. Raises `UserError` for groups
    whose weights sum to 0.
    """
    import torch

    kind = plan.router(index)
    if kind == "linear":
        return plan.tensors.router_maps[index].double()
    survivors = plan.survivors(index, num_experts)
    groups = plan.groups(index) if kind == "mean" else {}
    matrix = torch.zeros(len(survivors), num_experts, dtype=torch.float64)
    for row, expert in enumerate(survivors):
        members = groups.get(expert, {expert: 1.0})
        total = sum(members.values())
        if abs(total) < 1e-9:
            raise UserError(
                f"Layer {index}: the weights of experts {sorted(members)} sum to {total:g}, so "
                "the mean of their router rows is not defined; take another router edit."
            )
        for member, weight in members.items():
            matrix[row, member] = weight / total
    return matrix
