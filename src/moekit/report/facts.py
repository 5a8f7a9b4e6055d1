"""Everything a report says about one model, measured once; pages and terminals only read it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moekit.analyze import Result, analyze
from moekit.analyze.reading import check_filled
from moekit.analyze.traces import joined
from moekit.core.errors import UserError
from moekit.core.trace import RoutingTrace
from moekit.report.memory_forecast import MemoryForecast, memory_forecast
from moekit.report.pruning import Pruning, pruning_of
from moekit.report.sources import Subject, TrainingRun
from moekit.report.token_text import TokenText, token_text
from moekit.report.usage import (
    Usage,
    by_language,
    languages_of,
    usage_by_language,
    usage_of_stats,
    usage_of_trace,
)

if TYPE_CHECKING:
    from moekit.core.record import RunRecord
    from moekit.core.spec import MoESpec
    from moekit.core.view import MoEView

OF_TRACE = ("load", "specialisation", "cache-curve", "layer-prediction", "token-identity")
OF_MODEL = ("super-experts", "redundancy")
OF_TRAINING = ("training-phases", "routing-drift")
STORED_BITS = {"float32": 32, "bfloat16": 16, "float16": 16}


@dataclass
class Facts:
    """What is known of a model; parts that could not be measured are None, or named in `missing`.

    `results` and `missing` (reasons) are by measure; `languages` is the usage and specialisation by
    language where domains are named after languages. `bits_per_byte` is by domain.
    """

    name: str
    model_type: str
    usage: Usage
    results: dict[str, Result] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    languages: tuple[Usage, Result | None] | None = None
    spec: MoESpec | None = None
    bits: float = 16
    pruning: Pruning | None = None
    memory: MemoryForecast | None = None
    text: TokenText | None = None
    training: TrainingRun | None = None
    bits_per_byte: dict[str, float] = field(default_factory=dict)
    record: RunRecord | None = None

    @property
    def tokens(self) -> int:
        return int(self.usage.tokens.sum())

    @property
    def dead(self) -> list[tuple[int, int]]:
        """Experts that were never chosen, as (position of the layer, expert)."""
        return [
            (position, expert)
            for position, load in enumerate(self.usage.load)
            for expert in (load == 0).nonzero()[0].tolist()
        ]


def gather(
    subject: Subject,
    *,
    view: MoEView | None = None,
    spec: MoESpec | None = None,
    tokenizer: Any = None,
    memory: int | None = None,
    bits_per_byte: dict[str, float] | None = None,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> Facts:
    """Measure what the subject's trace, stats and model allow.

    `memory` in bytes asks for the cache forecast, which needs `spec`. Raises UserError where there
    is neither a trace nor stats, where nothing was recorded, and for parts of different models.
    """
    trace = None
    if subject.traces:
        trace = joined(subject.traces)
    elif subject.probes and subject.stats is None:
        trace = subject.probes[-1]
    if trace is not None:
        check_filled(trace)
    usage = _usage(subject, trace)
    facts = Facts(
        subject.name,
        _model_type(subject, trace, spec),
        usage,
        results=dict(subject.results),
        spec=spec,
        training=subject.training,
        record=subject.record,
    )
    _check_one_model(subject, trace, spec)
    if spec is not None:
        facts.bits = STORED_BITS.get(spec.dtype or "", 16)
    if trace is not None:
        _measure(facts, trace, OF_TRACE, None, seed, say)
        if view is not None:
            _measure(facts, trace, OF_MODEL, view, seed, say)
        languages = languages_of(usage.domains)
        if languages is not None:
            facts.languages = _languages(usage, trace, languages, seed)
        if tokenizer is not None:
            facts.text = token_text(trace, tokenizer)
    if len(subject.probes) > 1:
        for name in OF_TRAINING:
            _try(facts, name, subject.probes, None, seed, say)
    facts.bits_per_byte = dict(
        bits_per_byte or (subject.training.bits_per_byte if subject.training else {})
    )
    try:
        facts.pruning = pruning_of(subject.stats, facts.results.get("load"), spec, facts.bits)
    except UserError as error:
        facts.missing["pruning"] = str(error)
    if memory is not None and spec is not None:
        curve = facts.results.get("cache-curve")
        facts.memory = memory_forecast(spec, memory, facts.bits, curve)
    return facts


def _usage(subject: Subject, trace: RoutingTrace | None) -> Usage:
    if trace is not None:
        return usage_of_trace(trace)
    if subject.stats is not None:
        return usage_of_stats(subject.stats)
    raise UserError(
        f"{subject.name}: nothing says what its routers do: give --data with text to run it on, "
        "or a trace or stats beside it"
    )


def _model_type(subject: Subject, trace: RoutingTrace | None, spec: MoESpec | None) -> str:
    if spec is not None:
        return spec.model_type
    if trace is not None and trace.header.model_type:
        return trace.header.model_type
    return subject.stats.model_type if subject.stats is not None else ""


def _check_one_model(subject: Subject, trace: RoutingTrace | None, spec: MoESpec | None) -> None:
    shapes = {}
    if spec is not None:
        shapes["model"] = [(s.layer_index, s.num_experts, s.top_k) for s in spec.per_layer]
    if trace is not None:
        shapes["trace"] = [(s.index, s.num_experts, s.top_k) for s in trace.layers]
    if subject.stats is not None:
        shapes["stats"] = [(s.index, s.num_experts, s.top_k) for s in subject.stats.layers]
    names = list(shapes)
    for name in names[1:]:
        if shapes[name] != shapes[names[0]]:
            raise UserError(
                f"{subject.name}: the {names[0]} and the {name} are of different models: "
                f"{_shape(shapes[names[0]])} and {_shape(shapes[name])}"
            )


def _shape(layers: list[tuple[int, int, int]]) -> str:
    experts = sorted({layer[1] for layer in layers})
    chosen = sorted({layer[2] for layer in layers})
    return f"{len(layers)} MoE layers of {experts} experts, top {chosen}".replace("[", "").replace(
        "]", ""
    )


def _measure(
    facts: Facts,
    trace: RoutingTrace,
    names: tuple[str, ...],
    view: MoEView | None,
    seed: int,
    say: Callable[[str], None],
) -> None:
    for name in names:
        # What an analysis beside the trace holds has been measured on more than is done here.
        if name not in facts.results:
            _try(facts, name, trace, view, seed, say)


def _try(
    facts: Facts,
    name: str,
    traces: Any,
    view: MoEView | None,
    seed: int,
    say: Callable[[str], None],
) -> None:
    say(name)
    try:
        found = analyze(traces, [name], view=view, seed=seed)
        facts.results[name] = found.results[name]
    except UserError as error:
        facts.missing[name] = str(error).removeprefix(f"{name}: ")


def _languages(
    usage: Usage, trace: RoutingTrace, languages: list[str], seed: int
) -> tuple[Usage, Result | None]:
    try:
        found = analyze(by_language(trace, languages), ["specialisation"], seed=seed)
        result = found.results["specialisation"]
    except UserError:
        result = None
    return usage_by_language(usage, languages), result
