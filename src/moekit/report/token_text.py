"""A few passages of the traced text, token by token, with the experts of every token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moekit.core.trace import RoutingTrace
from moekit.report.usage import language_of

PASSAGES, PASSAGE_TOKENS, SHOWN_LAYERS = 6, 100, 8
# A character of UTF-8 has 4 bytes at most, and a token one byte at least.
LONGEST_CHARACTER = 4


@dataclass(frozen=True)
class Passage:
    """Tokens of one text; `experts` [T, L, K] and their weights in percent, of the shown layers."""

    domain: str
    tokens: list[str]
    experts: NDArray[np.int64]
    weights: NDArray[np.int64]


@dataclass(frozen=True)
class TokenText:
    """Passages of different domains; `layers` are the decoder layers that are shown."""

    layers: list[int]
    passages: list[Passage]


def token_text(trace: RoutingTrace, tokenizer: Any) -> TokenText | None:
    """The beginnings of texts, one a domain at first; None for a trace without token ids."""
    chosen = _samples(trace)
    positions = _spread(len(trace.layers), SHOWN_LAYERS)
    passages = []
    for start, stop, domain in chosen:
        ids = trace.tokens[start:stop].tolist()
        if min(ids) < 0:
            continue
        routings = [trace.layer(position, start, stop) for position in positions]
        width = max(routing.topk_ids.shape[1] for routing in routings)
        experts = np.full((stop - start, len(positions), width), -1)
        weights = np.zeros((stop - start, len(positions), width))
        for place, routing in enumerate(routings):
            chosen_ids = routing.topk_ids.numpy()
            experts[:, place, : chosen_ids.shape[1]] = chosen_ids
            weights[:, place, : chosen_ids.shape[1]] = routing.topk_weights.float().numpy()
        order = np.argsort(-weights, axis=-1, kind="stable")
        experts = np.take_along_axis(experts, order, axis=-1)
        weights = np.take_along_axis(weights, order, axis=-1)
        share = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-12)
        percent = np.rint(100 * share).astype(np.int64)
        passages.append(Passage(domain, token_strings(ids, tokenizer), experts, percent))
    if not passages:
        return None
    return TokenText([trace.layers[position].index for position in positions], passages)


def token_strings(ids: list[int], tokenizer: Any) -> list[str]:
    """The text of every token; of tokens that share a character the last one has it."""
    strings: list[str] = []
    pending: list[int] = []
    for token in ids:
        pending.append(token)
        text = tokenizer.decode(pending, clean_up_tokenization_spaces=False)
        if text.endswith("\ufffd") and len(pending) < LONGEST_CHARACTER:
            strings.append("")
            continue
        strings.append(text)
        pending = []
    return strings


def _samples(trace: RoutingTrace) -> list[tuple[int, int, str]]:
    """Bounds and domain of passages: the longest of a domain, as many languages as there are."""
    best: dict[str, tuple[int, int, str]] = {}
    for sample in trace.samples:
        length = sample.stop - sample.start
        kept = best.get(sample.domain)
        if length and (kept is None or length > kept[1] - kept[0]):
            best[sample.domain] = (sample.start, sample.stop, sample.domain)
    domains = [domain for domain in trace.domains if domain in best]
    first = {language_of(domain): domain for domain in reversed(domains)}
    others = [domain for domain in domains if domain not in first.values()]
    chosen = [d for d in domains if d in first.values()] + others
    found = [best[domain] for domain in chosen[:PASSAGES]]
    return [(start, min(stop, start + PASSAGE_TOKENS), domain) for start, stop, domain in found]


def _spread(count: int, most: int) -> list[int]:
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})
