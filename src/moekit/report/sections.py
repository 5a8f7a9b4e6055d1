"""The sections of a report on one model: what each shows, in which words, from which facts."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from moekit.core.memory import format_bytes
from moekit.report import charts, maps
from moekit.report.conclusions import percent
from moekit.report.facts import Facts
from moekit.report.figure import Figure
from moekit.report.text_html import text_html

FIRST_TO_PRUNE = 12
NEEDS_MODEL = "that needs the model at work: name it, and --data"


@dataclass(frozen=True)
class Block:
    """What one model has to show in a section: figures, then HTML (escaped already)."""

    figures: list[Figure] = field(default_factory=list)
    html: str = ""


@dataclass(frozen=True)
class Section:
    """A section of the page; `blocks` one for every model, `lead` is how to read it."""

    key: str
    short: str
    title: str
    lead: str
    blocks: list[Block]


TITLES = {
    "load": (
        "Load",
        "Who does the work",
        "A cell is an expert, a row a layer. Blue experts get more than their even share of "
        "tokens, orange ones less; × marks experts that were never chosen.",
    ),
    "domains": (
        "Domains",
        "Which expert serves which kind of text",
        "Blue: the expert is chosen more often for this domain than on average; orange: less "
        "often. A ring marks experts that stand out against domains exchanged at random.",
    ),
    "languages": (
        "Languages",
        "Which expert serves which language",
        "The same, with all domains of one language taken together.",
    ),
    "flow": (
        "Flow",
        "From layer to layer",
        "What decides the experts: the token itself, or the layer before? Then the paths that "
        "tokens take more often than by chance.",
    ),
    "cache": (
        "Memory",
        "Running it in little memory",
        "If only some experts are kept in memory, how often is the one that is needed there? The "
        "dotted line is what routing without any pattern would give.",
    ),
    "super": (
        "Super experts",
        "Super experts",
        "A few experts can make outputs so large that attention depends on them; removing one "
        "breaks a model.",
    ),
    "redundancy": (
        "Similar experts",
        "Experts that do the same",
        "Experts that join low down are alike: candidates to be merged.",
    ),
    "pruning": (
        "Pruning",
        "What to prune first",
        "How much of what experts add to the model is lost when those that add least are removed.",
    ),
    "text": (
        "Text",
        "Text by expert",
        "Every token is tinted by the expert that got most weight. Point at a token or touch it: "
        "all tokens with the same first expert light up.",
    ),
    "training": (
        "Training",
        "How it was trained",
        "The course of the training run, from its log and probes.",
    ),
}


def sections(every: Sequence[Facts]) -> list[Section]:
    """All sections that at least one of the models has something to say in."""
    found = []
    for key, (short, title, lead) in TITLES.items():
        blocks = [BUILDERS[key](facts) for facts in every]
        if any(block is not None for block in blocks):
            shown = [
                block or Block(html=_note("Nothing known about this model.")) for block in blocks
            ]
            found.append(Section(key, short, title, lead, shown))
    return found


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """An HTML table of escaped cells; numbers to the right."""
    head = "".join(f"<th scope=col>{html.escape(name)}</th>" for name in header)
    body = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
    inside = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f"<div class=scroll><table>{inside}</table></div>"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        shown = "–" if value != value else f"{value:.3f}"
        return f"<td class=n>{shown}</td>"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"<td class=n>{value:,}</td>"
    return f"<td>{html.escape(str(value))}</td>"


def _numbers(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    return f"<details><summary>Numbers</summary>{table(header, rows)}</details>"


def _note(text: str) -> str:
    return f"<p class=note>{html.escape(text)}</p>"


def _load(facts: Facts) -> Block:
    result = facts.results.get("load")
    numbers = _numbers(result.columns, result.rows) if result is not None else ""
    return Block([maps.load_map(facts.usage)], numbers)


def _domains(facts: Facts) -> Block:
    if len(facts.usage.domains) < 2:
        return Block(html=_note("All text is of one domain; a domain is the name of a data file."))
    result = facts.results.get("specialisation")
    figures = [maps.domain_map(facts.usage, result, "domains")]
    if result is None:
        return Block(
            figures, _note(f"Not tested against chance: {facts.missing['specialisation']}")
        )
    other = facts.languages[1] if facts.languages is not None else None
    figures.append(charts.information_chart(result, other))
    return Block(figures, _numbers(result.columns, result.rows))


def _languages(facts: Facts) -> Block | None:
    if facts.languages is None:
        return None
    usage, result = facts.languages
    numbers = _numbers(result.columns, result.rows) if result is not None else ""
    return Block([maps.domain_map(usage, result, "languages")], numbers)


def _flow(facts: Facts) -> Block | None:
    prediction = facts.results.get("layer-prediction")
    chart = charts.token_chart(facts.results.get("token-identity"), prediction)
    flow = maps.flow_map(facts.usage)
    figures = [figure for figure in (chart, flow) if figure is not None]
    if not figures:
        return None
    numbers = _numbers(prediction.columns, prediction.rows) if prediction is not None else ""
    return Block(figures, numbers)


def _cache(facts: Facts) -> Block:
    result = facts.results.get("cache-curve")
    if result is None:
        reason = facts.missing.get("cache-curve", "it needs a trace")
        return Block(html=_note(f"No cache curve: {reason}."))
    words = ""
    memory = facts.memory
    if memory is None:
        words = _note(
            "With --memory (14GB, say) this section says how the model would run in yours."
            if facts.spec is not None
            else "Name the model beside the trace, and --memory, to see how it would run in yours."
        )
    elif memory.read_bytes is not None:
        words = table(
            ("in your memory", ""),
            [
                ("memory", format_bytes(memory.memory)),
                ("the whole model", format_bytes(memory.needed)),
                ("all but routed experts", format_bytes(memory.resident)),
                ("one expert", format_bytes(memory.expert_bytes)),
                ("experts that fit, a layer", f"{memory.slots} of {memory.num_experts}"),
                ("there when needed (LRU)", percent(memory.lru or 0)),
                ("read from the drive, a token", format_bytes(memory.read_bytes)),
            ],
        )
    figure = charts.cache_chart(result, memory)
    return Block([figure], words + _numbers(result.columns, result.rows))


def _super(facts: Facts) -> Block:
    result = facts.results.get("super-experts")
    if result is None:
        reason = facts.missing.get("super-experts", NEEDS_MODEL)
        return Block(html=_note(f"Not measured: {reason}."))
    return Block([maps.peak_map(facts.usage, result)], _numbers(result.columns, result.rows))


def _redundancy(facts: Facts) -> Block:
    result = facts.results.get("redundancy")
    if result is None:
        reason = facts.missing.get("redundancy", NEEDS_MODEL)
        return Block(html=_note(f"Not measured: {reason}."))
    return Block([maps.similarity_map(result)], _numbers(result.columns, result.rows))


def _pruning(facts: Facts) -> Block:
    pruning = facts.pruning
    if pruning is None:
        return Block(
            html=_note(f"Not ranked: {facts.missing.get('pruning', 'nothing to rank by')}.")
        )
    cuts = [
        (
            percent(cut.share),
            cut.experts,
            percent(cut.lost),
            "unknown" if cut.saved is None else format_bytes(cut.saved),
        )
        for cut in pruning.cuts
    ]
    specialists = _specialists(facts)
    first = [
        (
            facts.usage.layers[position],
            expert,
            f"{times:.2f}×",
            specialists.get((position, expert), ""),
        )
        for position, expert, times in pruning.first(FIRST_TO_PRUNE)
    ]
    words = table(("removed", "experts", "contribution lost", "saved"), cuts)
    words += "<h4>First candidates</h4>"
    words += table(("layer", "expert", "adds (1× is an even share)", "but serves"), first)
    words += _note(
        f"Contribution is {pruning.basis}. It ranks; it does not measure quality. An expert that "
        "adds little here may serve text that was not in the data."
    )
    return Block([charts.pruning_chart(pruning)], words)


def _specialists(facts: Facts) -> dict[tuple[int, int], str]:
    """The domain that an expert stands out for most, by (position of the layer, expert)."""
    result = facts.results.get("specialisation")
    found: dict[tuple[int, int], str] = {}
    if result is not None:
        for position, layer in enumerate(result.detail["specialists"]):
            for item in layer:
                found.setdefault((position, int(item["expert"])), str(item["domain"]))
    return found


def _text(facts: Facts) -> Block:
    if facts.text is None:
        return Block(
            html=_note(
                "The model's tokenizer is needed to show text: name the model beside the trace."
            )
        )

    return Block(html=text_html(facts.text))


def _training(facts: Facts) -> Block | None:
    if facts.training is None:
        return None
    return Block(charts.training_charts(facts.training, facts))


BUILDERS: dict[str, Callable[[Facts], Block | None]] = {
    "load": _load,
    "domains": _domains,
    "languages": _languages,
    "flow": _flow,
    "cache": _cache,
    "super": _super,
    "redundancy": _redundancy,
    "pruning": _pruning,
    "text": _text,
    "training": _training,
}
