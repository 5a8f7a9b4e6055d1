"""`ExpertPlan` as text: JSON in both directions, a table, and the difference of two plans."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moekit.core.errors import UserError
from moekit.core.plan import (
    FORMAT,
    NOTHING,
    OF_RESULT,
    VERSION,
    Action,
    ExpertPlan,
    Fingerprint,
    Fit,
)
from moekit.core.plan_tensors import PlanTensors

# Only to refuse a mistyped range before it fills the memory.
MAX_EXPERT = 2**20
PLAN_KEYS = ("format", "version", "note", "model", "fit", "tensors", "layers")
LAYER_KEYS = ("keep", "drop", "protect", "groups", "router", *OF_RESULT)


def plan_to_json(plan: ExpertPlan) -> str:
    """One line per layer; equal neighbours share a key such as "0-63"."""
    head: dict[str, Any] = {"format": FORMAT, "version": VERSION}
    if plan.note:
        head["note"] = plan.note
    if plan.model is not None:
        head["model"] = {
            "model_type": plan.model.model_type,
            "layers": list(plan.model.layers),
            "num_experts": _uniform(plan.model.num_experts),
            "top_k": _uniform(plan.model.top_k),
        }
    if plan.fit is not None:
        head["fit"] = dataclasses.asdict(plan.fit)
    if plan.tensors:
        head["tensors"] = plan.tensors.sha256()
    lines = [f" {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
    layers = [f'  "{i}": {json.dumps(_layer_to_json(plan, i))}' for i in _indices(plan)]
    body = "{\n" + ",\n".join(layers) + "\n }" if layers else "{}"
    return "\n".join(["{", *lines, f' "layers": {body}', "}"]) + "\n"


def _indices(plan: ExpertPlan) -> list[int]:
    return sorted({*plan.layers, *plan.routers})


def _uniform(values: tuple[int, ...]) -> int | list[int]:
    return values[0] if len(set(values)) == 1 else list(values)


def _layer_to_json(plan: ExpertPlan, index: int) -> dict[str, Any]:
    actions = plan.layers.get(index, {})
    layer: dict[str, Any] = {
        "router": plan.routers.get(index),
        "drop": plan.dropped(index),
        "protect": [expert for expert, action in actions.items() if action.protect],
        "groups": [
            {str(expert): weight for expert, weight in members.items()}
            for members in plan.groups(index).values()
        ],
    }
    for name in OF_RESULT:
        values = {e: getattr(a, name) for e, a in actions.items() if getattr(a, name) is not None}
        layer[name] = dict(_joined(values))
    return {key: value for key, value in layer.items() if value}


def _joined(values: Mapping[int, Any]) -> Iterator[tuple[str, Any]]:
    run: list[int] = []
    for expert in sorted(values):
        if run and (expert != run[-1] + 1 or values[expert] != values[run[0]]):
            yield _key(run), values[run[0]]
            run = []
        run.append(expert)
    if run:
        yield _key(run), values[run[0]]


def _key(run: list[int]) -> str:
    return str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}"


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


class _Reader:
    """Reads one plan; every complaint names the file and the place in it."""

    def __init__(self, source: str, tensors: Path | None) -> None:
        self.source = source
        self.tensors = tensors

    def error(self, what: str) -> UserError:
        return UserError(f"{self.source}: {what}.")

    def plan(self, text: str) -> ExpertPlan:
        try:
            content = json.loads(text, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise self.error(f"not valid JSON ({error})") from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise self.error(f'no plan; its "format" must be "{FORMAT}"')
        if content.get("version") != VERSION:
            raise self.error(
                f"version {content.get('version')!r}; this moekit reads version {VERSION}"
            )
        self.known(content, PLAN_KEYS, "the plan")
        model = self.fingerprint(content["model"]) if content.get("model") is not None else None
        layers = content.get("layers", {})
        if not isinstance(layers, dict):
            raise self.error('"layers" must map layer numbers to actions')
        made = {
            self.number(key, f"layer {key!r}"): self.layer(key, value, model)
            for key, value in layers.items()
        }
        note = content.get("note", "")
        if not isinstance(note, str):
            raise self.error('"note" must be text')
        routers = {
            int(key): self.text(value["router"], f"layer {key}, router")
            for key, value in layers.items()
            if "router" in value
        }
        tensors, fit = self.values_of(content.get("tensors")), self.fit(content.get("fit"))
        return ExpertPlan(made, model, note, routers, tensors, fit)

    def text(self, value: Any, where: str) -> str:
        if not isinstance(value, str):
            raise self.error(f"{where} must be text")
        return value

    def values_of(self, sha256: Any) -> PlanTensors:
        if sha256 is None:
            return PlanTensors()
        if self.tensors is None or not self.tensors.is_file():
            where = f"the file {self.tensors}" if self.tensors else "a file beside it"
            raise self.error(f"its values lie in {where}, which is not there")
        found = PlanTensors.from_bytes(self.tensors.read_bytes(), str(self.tensors))
        if found.sha256() != sha256:
            raise self.error(f"{self.tensors} belongs to another plan (its hash differs)")
        return found

    def fit(self, content: Any) -> Fit | None:
        if content is None:
            return None
        if not isinstance(content, dict) or not isinstance(content.get("method"), str):
            raise self.error('"fit" must have method, stats and options')
        self.known(content, ("method", "stats", "options"), '"fit"')
        options = content.get("options", {})
        if not isinstance(options, dict):
            raise self.error('"fit": options must map names to values')
        stats = content.get("stats")
        return Fit(content["method"], None if stats is None else self.text(stats, "stats"), options)

    def known(self, content: Mapping[str, Any], keys: tuple[str, ...], where: str) -> None:
        for key in content:
            if key not in keys:
                raise self.error(f"{where} has the unknown key {key!r}; known: {', '.join(keys)}")

    def number(self, value: Any, where: str) -> int:
        if isinstance(value, str) and value.isdecimal():
            return int(value)
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return value
        raise self.error(f"{where} is no number from 0 up")

    def fingerprint(self, content: Any) -> Fingerprint:
        keys = ("model_type", "layers", "num_experts", "top_k")
        if not isinstance(content, dict) or set(content) != set(keys):
            raise self.error(f'"model" must have {", ".join(keys)}')
        if not isinstance(content["model_type"], str) or not isinstance(content["layers"], list):
            raise self.error('"model": model_type must be text and layers a list')
        layers = tuple(self.number(i, f'"model": layer {i!r}') for i in content["layers"])
        counts = []
        for key in ("num_experts", "top_k"):
            values = (
                content[key] if isinstance(content[key], list) else [content[key]] * len(layers)
            )
            if len(values) != len(layers):
                raise self.error(f'"model": {len(values)} values of {key} for {len(layers)} layers')
            counts.append(tuple(self.number(v, f'"model": {key} {v!r}') for v in values))
        return Fingerprint(content["model_type"], layers, *counts)

    def layer(self, key: str, content: Any, model: Fingerprint | None) -> dict[int, Action]:
        where = f"layer {key}"
        if not isinstance(content, dict):
            raise self.error(f"{where} must map actions to experts")
        self.known(content, LAYER_KEYS, where)
        fields: dict[int, dict[str, Any]] = {}

        def put(expert: int, **values: Any) -> None:
            own = fields.setdefault(expert, {})
            for name, value in values.items():
                if own.setdefault(name, value) != value:
                    raise self.error(f"{where}, expert {expert} has two values of {name}")

        count = model.experts_in(int(key)) if model is not None else None
        for expert in self.dropped(where, content, count):
            put(expert, drop=True)
        for expert in self.ids(content.get("protect", []), f"{where}, protect"):
            put(expert, protect=True)
        for number, group in enumerate(self.list_of(content.get("groups", []), f"{where}, groups")):
            if not isinstance(group, dict):
                raise self.error(f"{where}: a group must map experts to weights")
            for expert, weight in self.values(group, f"{where}, groups", False):
                put(expert, group=number, weight=float(weight))
        for name in OF_RESULT:
            whole = name != "bits"
            for expert, value in self.values(content.get(name, {}), f"{where}, {name}", whole):
                put(expert, **{name: value})
        return {expert: Action(**values) for expert, values in fields.items()}

    def dropped(self, where: str, content: Mapping[str, Any], count: int | None) -> list[int]:
        if "keep" not in content:
            return self.ids(content.get("drop", []), f"{where}, drop")
        if "drop" in content:
            raise self.error(f"{where} has both keep and drop; give one of them")
        if count is None:
            raise self.error(
                f'{where} has keep, which needs "model" with the number of experts; or use drop'
            )
        kept = self.ids(content["keep"], f"{where}, keep")
        if any(expert >= count for expert in kept):
            raise self.error(f"{where} keeps expert {max(kept)}, it has 0 to {count - 1}")
        return [expert for expert in range(count) if expert not in kept]

    def list_of(self, content: Any, where: str) -> list[Any]:
        if not isinstance(content, list):
            raise self.error(f"{where} must be a list")
        return content

    def ids(self, content: Any, where: str) -> list[int]:
        return [
            self.number(item, f"{where}: expert {item!r}") for item in self.list_of(content, where)
        ]

    def values(self, content: Any, where: str, whole: bool) -> Iterator[tuple[int, Any]]:
        """(expert, number) from {"3": x, "5-7": y}."""
        if not isinstance(content, dict):
            raise self.error(f"{where} must map experts to numbers")
        for key, value in content.items():
            if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
                raise self.error(f"{where}: {value!r} for expert {key} is no number")
            first, _, last = key.partition("-")
            start = self.number(first, f"{where}: expert {key!r}")
            stop = self.number(last or first, f"{where}: expert {key!r}")
            if not start <= stop <= MAX_EXPERT:
                raise self.error(f"{where}: {key!r} is no range of experts")
            for expert in range(start, stop + 1):
                yield expert, value


def plan_from_json(text: str, source: str = "the plan", tensors: Path | None = None) -> ExpertPlan:
    """Parse a plan; raises `UserError` naming `source` and the place of what is wrong.

    `tensors` is the safetensors file with its values.
    """
    return _Reader(source, tensors).plan(text)


def plan_table(plan: ExpertPlan) -> str:
    """Per layer how many experts go, stay, are folded and get which bits, rank and width."""
    header = ["layer", "experts", "drop", "folded", "left", "router", *OF_RESULT, "protect"]
    rows = [header]
    indices = sorted({*_indices(plan), *(plan.model.layers if plan.model else ())})
    for index in indices:
        actions = plan.layers.get(index, {})
        count = plan.model.experts_in(index) if plan.model else None
        groups = plan.groups(index)
        folded = sum(len(members) for members in groups.values())
        rows.append(
            [
                str(index),
                "-" if count is None else str(count),
                str(len(plan.dropped(index))),
                f"{folded} to {len(groups)}" if groups else "0",
                "-" if count is None else str(len(plan.survivors(index, count))),
                plan.router(index),
                *(_span([getattr(a, name) for a in actions.values()]) for name in OF_RESULT),
                str(sum(action.protect for action in actions.values())),
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    title = [plan.model.describe()] if plan.model else []
    fitted = [f"values computed by {plan.fit.method}"] if plan.fit else []
    return "\n".join([*title, *([plan.note] if plan.note else []), *fitted, *lines])


def _span(values: list[Any]) -> str:
    given = [value for value in values if value is not None]
    if not given:
        return "-"
    low, high = min(given), max(given)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def plan_diff(before: ExpertPlan, after: ExpertPlan) -> list[str]:
    """One line per expert that is treated differently, and one if the models differ."""
    lines = []
    if before.model != after.model:
        described = [p.model.describe() if p.model else "any model" for p in (before, after)]
        lines.append(f"model: {described[0]} -> {described[1]}")
    if before.fit != after.fit:
        fits = [p.fit.method if p.fit else "none" for p in (before, after)]
        lines.append(f"fit: {fits[0]} -> {fits[1]}")
    if before.tensors != after.tensors:
        lines.append("the values beside the plans (neurons, router maps) differ")
    for layer in sorted({*_indices(before), *_indices(after)}):
        if before.router(layer) != after.router(layer):
            lines.append(f"layer {layer}: router {before.router(layer)} -> {after.router(layer)}")
        experts = {*before.layers.get(layer, {}), *after.layers.get(layer, {})}
        for expert in sorted(experts):
            old, new = before.action(layer, expert), after.action(layer, expert)
            if old != new:
                lines.append(f"layer {layer}, expert {expert}: {_words(old)} -> {_words(new)}")
    return lines


def _words(action: Action) -> str:
    if action == NOTHING:
        return "keep"
    words = ["drop"] if action.drop else []
    if action.group is not None:
        words.append(f"fold into {action.group} with weight {action.weight:g}")
    words += [
        f"{name} {getattr(action, name):g}"
        for name in OF_RESULT
        if getattr(action, name) is not None
    ]
    return ", ".join([*words, *(["protect"] if action.protect else [])])
