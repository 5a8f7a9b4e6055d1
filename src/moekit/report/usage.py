"""Which experts are used for which domain and after which others: counts, of a trace or of stats.

Shapes: G domains, E experts of a layer, P experts of the MoE layer before.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moekit.analyze.reading import (
    count_by_group,
    multi_hot,
    pieces,
    read_ids,
    rows_of,
    sample_domains,
    sample_lengths,
)
from moekit.core.errors import UserError
from moekit.core.stats import ExpertStats
from moekit.core.trace import RoutingTrace

Counts = NDArray[np.int64]
# Enough for a picture of the flow; the measures read more.
FLOW_TOKENS = 2**15
NO_LANGUAGE = "no language"
LANGUAGES = {
    "ar": "Arabic",
    "bn": "Bengali",
    "cs": "Czech",
    "da": "Danish",
    "de": "German",
    "el": "Greek",
    "en": "English",
    "es": "Spanish",
    "fa": "Persian",
    "fi": "Finnish",
    "fr": "French",
    "he": "Hebrew",
    "hi": "Hindi",
    "hu": "Hungarian",
    "id": "Indonesian",
    "it": "Italian",
    "ja": "Japanese",
    "ko": "Korean",
    "nl": "Dutch",
    "no": "Norwegian",
    "pl": "Polish",
    "pt": "Portuguese",
    "ro": "Romanian",
    "ru": "Russian",
    "sv": "Swedish",
    "th": "Thai",
    "tr": "Turkish",
    "uk": "Ukrainian",
    "vi": "Vietnamese",
    "zh": "Chinese",
}


@dataclass(frozen=True)
class Usage:
    """Choices by layer: `counts` [G, E], and `flow` [P, E], None for a first layer.

    `layers` are decoder layer numbers, `tokens` [G] the tokens of each domain.
    """

    layers: list[int]
    top_k: list[int]
    domains: list[str]
    tokens: Counts
    counts: list[Counts]
    flow: list[NDArray[np.float64] | None]

    @property
    def load(self) -> list[Counts]:
        """Choices of every expert, all domains together, [E] a layer."""
        return [counts.sum(0) for counts in self.counts]

    @property
    def num_experts(self) -> int:
        return max(counts.shape[1] for counts in self.counts)


def usage_of_trace(trace: RoutingTrace) -> Usage:
    """Count the choices of a trace; the flow on a part of it."""
    groups = np.repeat(sample_domains(trace), sample_lengths(trace))
    count = len(trace.domains)
    rows = rows_of(pieces(trace, FLOW_TOKENS, 512))
    flow: list[NDArray[np.float64] | None] = []
    before = None
    for position, layer in enumerate(trace.layers):
        here = multi_hot(read_ids(trace, position, rows), layer.num_experts)
        flow.append(None if before is None else (before.T @ here).astype(np.float64))
        before = here
    return Usage(
        [layer.index for layer in trace.layers],
        [layer.top_k for layer in trace.layers],
        trace.domains,
        np.bincount(groups, minlength=count),
        [count_by_group(trace, position, groups, count) for position in range(len(trace.layers))],
        flow,
    )


def usage_of_stats(stats: ExpertStats) -> Usage:
    """The counts that stats hold; UserError where nothing was counted."""
    counts: list[Counts] = []
    flow: list[NDArray[np.float64] | None] = []
    for position, layer in enumerate(stats.layers):
        counts.append(stats.get(position, "count").numpy()[:, : layer.num_experts])
        if not position or not stats.has(position, "transitions"):
            flow.append(None)
            continue
        before = stats.layers[position - 1].num_experts
        moved = stats.get(position, "transitions").double().numpy()
        flow.append(moved[:before, : layer.num_experts])
    if not any(layer.any() for layer in counts):
        raise UserError("no expert was chosen in any layer in the text of the stats")
    return Usage(
        [layer.index for layer in stats.layers],
        [layer.top_k for layer in stats.layers],
        stats.domains,
        stats.get(0, "tokens").numpy(),
        counts,
        flow,
    )


def language_of(domain: str) -> str | None:
    """The language a domain's name ends in (`web-fr`, `fr`), None where it ends in none."""
    return LANGUAGES.get(re.split(r"[-_]", domain)[-1])


def languages_of(domains: Sequence[str]) -> list[str] | None:
    """The language of every domain, "no language" for some; None unless there are two languages."""
    found = [language_of(domain) for domain in domains]
    if len({name for name in found if name}) < 2:
        return None
    return [name or NO_LANGUAGE for name in found]


def by_language(trace: RoutingTrace, languages: list[str]) -> RoutingTrace:
    """The trace with the languages of its domains as its domains."""
    names = list(dict.fromkeys(languages))
    of_sample = [names.index(languages[number]) for number in trace.header.sample_domains]
    header = replace(trace.header, domains=names, sample_domains=of_sample)
    return RoutingTrace(header, trace.chunks)


def usage_by_language(usage: Usage, languages: list[str]) -> Usage:
    """The same counts with the languages of the domains as domains."""
    names = list(dict.fromkeys(languages))
    member = np.array([[language == name for language in languages] for name in names])
    joined = [(member @ counts).astype(np.int64) for counts in usage.counts]
    return replace(usage, domains=names, tokens=member @ usage.tokens, counts=joined)
