"""`ExpertPlan`: what shall be done to each expert of a model, as readable JSON.

A plan says per MoE layer and expert: drop it; fold it with others into one (`group`, `weight`);
store it at `bits`; approximate it at `rank`; cut it to `width`; or `protect` it from being dropped.
What a plan does not mention stays as it is, so plans may be partial and written by hand::

    {"format": "moekit.plan", "version": 1,
     "model": {"model_type": "mixtral", "layers": [0, 1], "num_experts": 8, "top_k": 2},
     "layers": {"0": {"drop": [1, 5], "groups": [{"0": 0.6, "3": 0.4}], "bits": {"2": 4}},
                "1": {"keep": [0, 1, 2, 3, 4, 5]}}}

Keys of `layers` are decoder layers, expert ids count from 0 in the model that the plan is for.
`keep` drops all others (and needs `model`). `model` may be left out; it is then not checked.

**Order within a plan.** Dropping and folding happen together; the experts of the result are
numbered in the order of their lowest original id. Bits, rank and width belong to the result: of
a group they may be given for any one member.

**Composition.** `a.then(b)` is one plan for the model of `a` that equals applying `a` and then `b`,
whose ids count in the result of `a`. An expert folded in both is folded with the product of its
weights; a later bits, rank or width replaces an earlier one, and folding forgets the earlier ones,
because its result is a new expert; protection lasts. Composition is associative (weights up to
rounding), and the empty plan is its identity.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from moekit.core.errors import UserError

FORMAT = "moekit.plan"
VERSION = 1
ACTIONS = ("drop", "group", "bits", "rank", "width", "protect")
# Properties of a resulting expert rather than of an original one.
OF_RESULT = ("bits", "rank", "width")


class LayerLike(Protocol):
    """What a plan needs to know of a MoE layer; `LayerSpec` has it."""

    @property
    def layer_index(self) -> int: ...
    @property
    def num_experts(self) -> int: ...
    @property
    def top_k(self) -> int: ...
    @property
    def num_groups(self) -> int: ...
    @property
    def topk_groups(self) -> int: ...
    @property
    def group_score(self) -> str | None: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def expert_width(self) -> int: ...


class SpecLike(Protocol):
    """What a plan needs to know of a model; `MoESpec` has it."""

    @property
    def model_type(self) -> str: ...
    @property
    def per_layer(self) -> Sequence[LayerLike]: ...


@dataclass(frozen=True)
class Action:
    """What happens to one expert. `group` is the lowest id of the experts folded together."""

    drop: bool = False
    group: int | None = None
    weight: float | None = None
    bits: float | None = None
    rank: int | None = None
    width: int | None = None
    protect: bool = False


NOTHING = Action()


@dataclass(frozen=True)
class Fingerprint:
    """The model a plan is for: its MoE layers with their numbers of experts and choices."""

    model_type: str
    layers: tuple[int, ...]
    num_experts: tuple[int, ...]
    top_k: tuple[int, ...]

    @classmethod
    def of(cls, spec: SpecLike) -> Fingerprint:
        layers = spec.per_layer
        return cls(
            spec.model_type,
            tuple(layer.layer_index for layer in layers),
            tuple(layer.num_experts for layer in layers),
            tuple(layer.top_k for layer in layers),
        )

    def experts_in(self, layer: int) -> int | None:
        return dict(zip(self.layers, self.num_experts, strict=True)).get(layer)

    def describe(self) -> str:
        def span(values: tuple[int, ...]) -> str:
            low, high = min(values, default=0), max(values, default=0)
            return str(low) if low == high else f"{low}-{high}"

        return (
            f"{self.model_type}, {len(self.layers)} MoE layers, "
            f"{span(self.num_experts)} experts, top-{span(self.top_k)}"
        )


@dataclass(frozen=True)
class ExpertPlan:
    """Actions per decoder layer and expert; experts that are not listed stay as they are.

    Construction puts a plan in canonical form (groups named by their lowest member, which holds
    their bits, rank and width; empty entries left out), so equal plans compare equal. Raises
    `UserError` for contradictions.
    """

    layers: Mapping[int, Mapping[int, Action]] = field(default_factory=dict)
    model: Fingerprint | None = None
    note: str = ""

    def __post_init__(self) -> None:
        layers = {}
        for index in sorted(self.layers):
            actions = _canonical(index, self.layers[index])
            if actions:
                layers[index] = actions
        object.__setattr__(self, "layers", layers)

    def action(self, layer: int, expert: int) -> Action:
        return self.layers.get(layer, {}).get(expert, NOTHING)

    def dropped(self, layer: int) -> list[int]:
        """Ids of the experts that a layer loses."""
        return [e for e, action in self.layers.get(layer, {}).items() if action.drop]

    def groups(self, layer: int) -> dict[int, dict[int, float]]:
        """Experts folded together: lowest id -> {member: weight}."""
        found: dict[int, dict[int, float]] = {}
        for expert, action in self.layers.get(layer, {}).items():
            if action.group is not None:
                found.setdefault(action.group, {})[expert] = action.weight or 0.0
        return found

    def survivors(self, layer: int, num_experts: int) -> list[int]:
        """Original ids (of a group: the lowest) in the order of the resulting experts."""
        return [e for e in range(num_experts) if self._survives(layer, e)]

    def _survives(self, layer: int, expert: int) -> bool:
        action = self.action(layer, expert)
        return not action.drop and action.group in (None, expert)

    def uses(self) -> list[str]:
        """The kinds of action that occur, out of `ACTIONS`."""
        actions = [action for layer in self.layers.values() for action in layer.values()]
        blank = dataclasses.asdict(NOTHING)
        return [name for name in ACTIONS if any(getattr(a, name) != blank[name] for a in actions)]

    def result(self) -> Fingerprint | None:
        """The model after the plan, where the model before it is known."""
        if self.model is None:
            return None
        counts = tuple(
            len(self.survivors(layer, count))
            for layer, count in zip(self.model.layers, self.model.num_experts, strict=True)
        )
        return dataclasses.replace(self.model, num_experts=counts)

    def then(self, later: ExpertPlan) -> ExpertPlan:
        """One plan that equals this one followed by `later`; see the module for the rules.

        Raises `UserError` where `later` is for another model than this plan leaves, or drops what
        this plan protects.
        """
        left = self.result()
        if left is not None and later.model is not None and left != later.model:
            raise UserError(
                f"The second plan is for {later.model.describe()}; the first leaves "
                f"{left.describe()}."
            )
        model = self.model
        if model is None and later.model is not None and not self._reduces():
            model = later.model
        layers = {
            index: _compose_layer(index, self, later)
            for index in sorted(set(self.layers) | set(later.layers))
        }
        note = "; ".join(part for part in (self.note, later.note) if part)
        return ExpertPlan(layers, model, note)

    compose = then

    def _reduces(self) -> bool:
        return bool({"drop", "group"} & set(self.uses()))

    def validate(self, spec: SpecLike) -> None:
        """Raise `UserError`, with the numbers, unless the plan can be applied to `spec`."""
        from moekit.core.plan_check import check_plan

        check_plan(self, spec)

    def table(self) -> str:
        """One line per layer, for people."""
        from moekit.core.plan_text import plan_table

        return plan_table(self)

    def diff(self, other: ExpertPlan) -> list[str]:
        """One line for every expert whose action differs."""
        from moekit.core.plan_text import plan_diff

        return plan_diff(self, other)

    def to_json(self) -> str:
        """JSON with one line per layer."""
        from moekit.core.plan_text import plan_to_json

        return plan_to_json(self)

    @classmethod
    def from_json(cls, text: str, source: str = "the plan") -> ExpertPlan:
        """Parse and check the form of a plan; `source` names it in errors (`UserError`)."""
        from moekit.core.plan_text import plan_from_json

        return plan_from_json(text, source)

    def save(self, path: str | os.PathLike[str]) -> None:
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ExpertPlan:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"The plan {path} cannot be read: {error}") from None
        return cls.from_json(text, str(path))


def _canonical(layer: int, actions: Mapping[int, Action]) -> dict[int, Action]:
    members: dict[int, list[int]] = {}
    for expert in sorted(actions):
        action = actions[expert]
        where = f"Layer {layer}, expert {expert}"
        if action.drop and action.group is not None:
            raise UserError(f"{where} is both dropped and folded into a group; choose one.")
        if action.drop and action.protect:
            raise UserError(f"{where} is both dropped and protected; choose one.")
        if action.group is not None:
            if action.weight is None or not math.isfinite(action.weight):
                raise UserError(f"{where}: weight {action.weight} in its group is no number.")
            members.setdefault(action.group, []).append(expert)
    made = {}
    for expert in sorted(actions):
        action = actions[expert]
        if action.drop:
            # What would have been done to an expert that is gone means nothing.
            action = Action(drop=True)
        elif action.group is None:
            action = dataclasses.replace(action, weight=None)
        if action != NOTHING:
            made[expert] = action
    for experts in members.values():
        shared = {name: _agreed(layer, experts, actions, name) for name in OF_RESULT}
        for expert in experts:
            own = shared if expert == experts[0] else dict.fromkeys(OF_RESULT)
            made[expert] = dataclasses.replace(made[expert], group=experts[0], **own)
    return made


def _agreed(layer: int, experts: list[int], actions: Mapping[int, Action], name: str) -> Any:
    values = {getattr(actions[expert], name) for expert in experts} - {None}
    if len(values) > 1:
        raise UserError(
            f"Layer {layer}: experts {experts} are folded into one but have {name} "
            f"{sorted(values)}; give one value."
        )
    return values.pop() if values else None


def _compose_layer(index: int, first: ExpertPlan, later: ExpertPlan) -> dict[int, Action]:
    """Actions on the ids of `first`'s model, from `later`'s on the ids of its result."""
    mine, theirs = first.layers.get(index, {}), later.layers.get(index, {})
    # Ids beyond every one that is mentioned are not moved by anything in between.
    reach = 1 + max(mine, default=-1) + 1 + max(theirs, default=-1)
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
        width=before.width if after.width is None else after.width,
        protect=protect,
    )
