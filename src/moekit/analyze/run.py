"""Runs measures on traces: the ones asked for, or all that apply."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from moekit.analyze.reading import check_filled
from moekit.analyze.result import Result
from moekit.analyze.traces import in_order_of_training, joined
from moekit.core.errors import UserError
from moekit.core.registry import Method, Option, registry
from moekit.core.trace import RoutingTrace

if TYPE_CHECKING:
    from moekit.core.view import MoEView


@dataclass(frozen=True)
class Analysis:
    """Results by measure, and the reasons why other measures do not apply, by measure."""

    results: dict[str, Result] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON."""
        measures = {name: result.to_dict() for name, result in self.results.items()}
        return {"measures": measures, "left_out": dict(self.left_out)}


def measures() -> list[Method]:
    """The registered measures that read traces, or the weights alone."""
    found = registry.methods(kind="measure")
    return [m for m in found if "trace" in m.needs or set(m.needs) == {"weights"}]


def analyze(
    traces: RoutingTrace | Sequence[RoutingTrace],
    names: Sequence[str] | None = None,
    *,
    view: MoEView | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    seed: int = 0,
    progress: Callable[[float, int], None] | None = None,
) -> Analysis:
    """Run the measures of these names, or all that apply, with `settings` by measure and option.

    Several traces are one text, unless each has a training step: then measures of training see all
    of them and the others the last. Measures that need the model run where `view` is given. `seed`
    is that of the measures that have one; `progress` is called with the measures done, in fractions
    within long ones, and their number. Raises UserError for an unknown name or option, an empty
    trace, a trace of another model than the view's, and a measure that was named or has settings
    and does not apply.
    """
    traces = [traces] if isinstance(traces, RoutingTrace) else list(traces)
    if not traces:
        raise UserError("no trace to analyse")
    settings = settings or {}
    chosen = _chosen(names, settings)
    course = in_order_of_training(traces)
    trace = course[-1] if course else joined(traces)
    check_filled(trace)
    if view is not None:
        from moekit.analyze.rerun import check_same_model

        check_same_model(trace, view)
    analysis = Analysis()
    for number, method in enumerate(chosen):
        if progress is not None:
            progress(number, len(chosen))
        options = settings.get(method.name, {})
        try:
            _check_options(method, options)
            arguments = _arguments(method, trace, course, view)
            seeded = {"seed": seed} if "seed" in {o.name for o in method.options} else {}
            code = method.load()
            if progress is not None and "progress" in inspect.signature(code).parameters:
                code = partial(code, progress=_within(progress, number, len(chosen)))
            analysis.results[method.name] = code(*arguments, **{**seeded, **options})
        except UserError as error:
            # A measure that was asked for, or configured, must run or say why not.
            if names is not None or options:
                raise UserError(f"{method.name}: {error}") from error
            analysis.left_out[method.name] = str(error)
    return analysis


def _chosen(names: Sequence[str] | None, settings: Mapping[str, Any]) -> list[Method]:
    known = {method.name: method for method in measures()}
    for name in [*(names or ()), *settings]:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"measures: {', '.join(known)}"
            raise UserError(f"no measure of traces is named {name!r}: {hint}")
    return [known[name] for name in dict.fromkeys(names)] if names else list(known.values())


def _check_options(method: Method, options: Mapping[str, Any]) -> None:
    known = {option.name: option for option in method.options}
    for name, value in options.items():
        if name not in known:
            raise UserError(f"no option {name!r}; options: {', '.join(known) or 'none'}")
        _check_value(known[name], value)
    missing = [o.name for o in method.options if o.required and o.name not in options]
    if missing:
        raise UserError(f"needs {' and '.join(missing)} (--set {method.name}.{missing[0]}=...)")


def _check_value(option: Option, value: Any) -> None:
    kinds = {"int": int, "float": int | float, "bool": bool, "str": str | int | float}
    outer = option.type.split("[")[0]
    kind = {"Sequence": list | tuple, "Mapping": Mapping}.get(outer, kinds.get(option.type, object))
    fits = isinstance(value, kind) and (outer == "bool" or not isinstance(value, bool))
    if not fits:
        raise UserError(f"{option.name} is {value!r}; it must be of type {option.type}")
    # An option of 0 by default is a seed; all other numbers count something.
    if kind is int and value < (0 if option.default == 0 else 1):
        raise UserError(f"{option.name} is {value}; it must be 1 or more")


def _within(
    progress: Callable[[float, int], None], number: int, count: int
) -> Callable[[int, int], None]:
    return lambda done, total: progress(number + done / total, count)


def _arguments(
    method: Method,
    trace: RoutingTrace,
    course: list[RoutingTrace] | None,
    view: MoEView | None,
) -> list[Any]:
    if "training" in method.needs:
        if course is None:
            raise UserError("needs the probe traces of a training run, several with a step each")
        return [course]
    if "weights" in method.needs:
        if view is None:
            raise UserError("needs the model: give --model")
        return [trace, view] if "trace" in method.needs else [view]
    return [trace]
