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

**Groups and their router.** A folded expert is the sum of its members times their weights, neuron
by neuron; `tensors.neurons` reorders the neurons of a member before that, and shortens them.
`width` keeps the first so many of the reordered neurons. The router of a layer is edited by
"slice" (rows of dropped experts go, a group keeps that of its lowest member), "mean" (a group gets
the weighted mean of its members' rows), "alias" (a group keeps all rows, and each of them leads to
the one folded expert, so that their gates add up) or "linear" (`tensors.router_maps`).

**Fitted values.** `fit` names a method that computes the values of the resulting experts from
their originals (GPTQ, say) instead of the plain sum, rounding or truncation; see `core.rewrite`.

**Order within a plan.** Dropping and folding happen together; the experts of the result are
numbered in the order of their lowest original id. Bits, rank and width belong to the result: of
a group they may be given for any one member.

**Composition.** `a.then(b)` is one plan for the model of `a` that equals applying `a` and then `b`,
whose ids count in the result of `a`. An expert folded in both is folded with the product of its
weights; later bits or rank replace earlier ones, and folding forgets them, because its result is a
new expert; of two widths the smaller holds; protection lasts. Composition is associative (weights
up to rounding), and the empty plan is its identity.
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
from moekit.core.plan_tensors import PlanTensors

FORMAT = "moekit.plan"
VERSION = 1
PLAN_FILE = "plan.json"
TENSORS_SUFFIX = ".safetensors"
ACTIONS = ("drop", "group", "bits", "rank", "width", "protect")
# Properties of a resulting expert rather than of an original one.
OF_RESULT = ("bits", "rank", "width")
ROUTERS = ("slice", "alias", "mean", "linear")


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
class Fit:
    """The method that computes the values, the stats it reads (a directory) and its options."""

    method: str
    stats: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ExpertPlan:
    """Actions per decoder layer and expert; experts that are not listed stay as they are.

    `routers` maps decoder layers to one of `ROUTERS`, "slice" where absent. Construction puts a
    plan in canonical form (groups named by their lowest member, which holds their bits, rank and
    width; empty entries left out), so equal plans compare equal. Raises `UserError` for
    contradictions.
    """

    layers: Mapping[int, Mapping[int, Action]] = field(default_factory=dict)
    model: Fingerprint | None = None
    note: str = ""
    routers: Mapping[int, str] = field(default_factory=dict)
    tensors: PlanTensors = field(default_factory=PlanTensors)
    fit: Fit | None = None

    def __post_init__(self) -> None:
        layers = {}
        for index in sorted(self.layers):
            actions = _canonical(index, self.layers[index])
            if actions:
                layers[index] = actions
        object.__setattr__(self, "layers", layers)
        for index, kind in self.routers.items():
            if kind not in ROUTERS:
                raise UserError(
                    f"Layer {index}: router {kind!r} is no edit; there are {', '.join(ROUTERS)}."
                )
            if (kind == "linear") != (index in self.tensors.router_maps):
                raise UserError(
                    f"Layer {index}: the router edit linear and a router map go together."
                )
        routers = {i: kind for i, kind in sorted(self.routers.items()) if kind != "slice"}
        object.__setattr__(self, "routers", routers)

    def action(self, layer: int, expert: int) -> Action:
        return self.layers.get(layer, {}).get(expert, NOTHING)

    def router(self, layer: int) -> str:
        """How the router of a layer is edited, one of `ROUTERS`."""
        return self.routers.get(layer, "slice")

    def num_experts(self, layer: int) -> int | None:
        """Experts of a layer before the plan, where it says so."""
        matrix = self.tensors.router_maps.get(layer)
        if matrix is not None:
            return matrix.shape[1]
        return self.model.experts_in(layer) if self.model is not None else None

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

        Raises `UserError` where `later` is for another model than this plan leaves, drops what this
        plan protects, or where no single plan can say the same.
        """
        from moekit.core.plan_compose import compose

        return compose(self, later)

    compose = then

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
        """Write the JSON to `path`, and the tensors, where there are any, beside it."""
        target = Path(path)
        target.write_text(self.to_json(), encoding="utf-8")
        if self.tensors:
            target.with_suffix(TENSORS_SUFFIX).write_bytes(self.tensors.to_bytes())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ExpertPlan:
        """Read a plan from its JSON file or from the directory with a `plan.json`."""
        from moekit.core.plan_text import plan_from_json

        file = Path(path) / PLAN_FILE if Path(path).is_dir() else Path(path)
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"The plan {path} cannot be read: {error}") from None
        return plan_from_json(text, str(file), file.with_suffix(TENSORS_SUFFIX))


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
