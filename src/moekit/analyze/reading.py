"""Reading a trace for statistics: the ids of a layer, counts by group, and a stated part of it.

Shapes: T tokens, K chosen, E experts, S samples, G groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moekit.core.errors import UserError
from moekit.core.trace import RoutingTrace

Ids = NDArray[np.int64]

# Choices that are counted at once: bounds memory at a few times 8 bytes each.
BLOCK = 2**20


@dataclass(frozen=True)
class Piece:
    """The tokens [start, stop) of one sample, from `position` of it on."""

    start: int
    stop: int
    sample: int
    position: int
    domain: str

    def __len__(self) -> int:
        return self.stop - self.start


def pieces(
    trace: RoutingTrace, max_tokens: int, length: int, *, leading: bool = False
) -> list[Piece]:
    """Cut the samples at `length` and take evenly spaced pieces of `max_tokens` in all.

    `leading` takes only the first piece of every sample. At least one piece is returned.
    """
    found = []
    for number, sample in enumerate(trace.samples):
        for start in range(sample.start, sample.stop, length):
            stop = min(start + length, sample.stop)
            found.append(Piece(start, stop, number, start - sample.start, sample.domain))
            if leading:
                break
    total = sum(map(len, found))
    if total > max_tokens:
        count = max(1, len(found) * max_tokens // total)
        found = [found[i * len(found) // count] for i in range(count)]
    return found


def numbers(text: str | float, name: str) -> list[float]:
    """Numbers above 0 from text such as "4,16"; UserError that names the option otherwise."""
    try:
        values = [float(part) for part in str(text).split(",")]
    except ValueError:
        values = []
    if not values or min(values) <= 0:
        raise UserError(f"{name} is {text!r}; it must be numbers above 0, separated by commas")
    return values


def rows_of(chosen: list[Piece]) -> Ids:
    """The token numbers of the pieces, [T]."""
    return np.concatenate([np.arange(piece.start, piece.stop) for piece in chosen])


def read_ids(trace: RoutingTrace, position: int, rows: Ids | None = None) -> Ids:
    """The ids [T, K] of a layer, at the ascending token numbers `rows` or everywhere.

    An id of -1 is no expert: a token that used fewer, or a choice that has no weights.
    """
    parts = [part for _, part in blocks(trace, position, rows)]
    return np.concatenate(parts)


def blocks(
    trace: RoutingTrace, position: int, rows: Ids | None = None
) -> Iterator[tuple[Ids, Ids]]:
    """Yield token numbers [t] and their ids [t, K], in order and in bounded memory."""
    layer = trace.layers[position]
    size = max(1, BLOCK // max(1, layer.top_k))
    for first, last in trace.spans():
        for start in range(first, last, size):
            stop = min(start + size, last)
            if rows is None:
                wanted = np.arange(start, stop)
            else:
                wanted = rows[np.searchsorted(rows, start) : np.searchsorted(rows, stop)]
            if not len(wanted):
                continue
            low, high = int(wanted[0]), int(wanted[-1]) + 1
            ids = trace.layer(position, low, high).topk_ids.numpy()
            if len(wanted) != high - low:
                ids = ids[wanted - low]
            yield wanted, np.where(ids < layer.num_experts, ids, -1)


def count_by_group(
    trace: RoutingTrace, position: int, groups: Ids, num_groups: int, rows: Ids | None = None
) -> NDArray[np.int64]:
    """Choices by group and expert, [G, E]; `groups` [N] by token number, -1 leaves a token out."""
    num_experts = trace.layers[position].num_experts
    counts = np.zeros(num_groups * num_experts, dtype=np.int64)
    for tokens, ids in blocks(trace, position, rows):
        group = groups[tokens][:, None]
        cells = (group * num_experts + ids)[(ids >= 0) & (group >= 0)]
        counts += np.bincount(cells, minlength=len(counts))
    return counts.reshape(num_groups, num_experts)


def usage_by_sample(trace: RoutingTrace, position: int) -> NDArray[np.int64]:
    """Choices by sample and expert, [S, E]."""
    num_experts = trace.layers[position].num_experts
    usage = np.zeros((len(trace.samples), num_experts), dtype=np.int64)
    sample_of = trace.sample_of.numpy()
    for tokens, ids in blocks(trace, position):
        sample = sample_of[tokens]
        low, high = int(sample[0]), int(sample[-1]) + 1
        cells = ((sample - low)[:, None] * num_experts + ids)[ids >= 0]
        counts = np.bincount(cells, minlength=(high - low) * num_experts)
        usage[low:high] += counts.reshape(high - low, num_experts)
    return usage


def multi_hot(ids: Ids, num_experts: int) -> NDArray[np.float32]:
    """1 where a token chose the expert, [T, E]."""
    hot = np.zeros((len(ids), num_experts + 1), dtype=np.float32)
    hot[np.arange(len(ids))[:, None], np.where(ids < 0, num_experts, ids)] = 1
    return hot[:, :num_experts]


def sample_domains(trace: RoutingTrace) -> NDArray[np.int64]:
    """The domain number of every sample, [S]."""
    return np.asarray(trace.header.sample_domains, dtype=np.int64)


def sample_lengths(trace: RoutingTrace) -> NDArray[np.int64]:
    """The tokens of every sample, [S]."""
    return np.asarray(trace.header.lengths, dtype=np.int64)


def check_filled(trace: RoutingTrace) -> None:
    """Raise UserError for a trace without tokens or without a single expert chosen."""
    if not len(trace):
        raise UserError("the trace is empty: it has no tokens; was the data empty?")
    if not trace.layers:
        raise UserError("the trace has no MoE layers")
    for position in range(len(trace.layers)):
        if any((ids >= 0).any() for _, ids in blocks(trace, position)):
            return
    raise UserError(f"no expert was chosen in any layer in the {len(trace)} tokens of the trace")


def check_domain(trace: RoutingTrace, name: str, min_tokens: int) -> None:
    """Raise UserError for a domain that is missing or has too little text to compare."""
    if name not in trace.domains:
        raise UserError(f"no domain is named {name!r}; the trace has {_list(trace.domains)}")
    lack = _lack(trace, name, min_tokens)
    if lack:
        raise UserError(lack)


def compared_domains(trace: RoutingTrace, min_tokens: int) -> tuple[list[str], list[str]]:
    """The domains with enough text, and a note about each of the others.

    Raises UserError where fewer than two have enough.
    """
    if len(trace.domains) < 2:
        raise UserError(
            f"the trace has one domain ({_list(trace.domains) or 'unnamed'}): comparing domains "
            "needs two or more; the domain is the data file's name"
        )
    lacking = {name: _lack(trace, name, min_tokens) for name in trace.domains}
    enough = [name for name, lack in lacking.items() if not lack]
    notes = [lack for lack in lacking.values() if lack]
    if len(enough) < 2:
        raise UserError(notes[0])
    return enough, [f"left out: {note}" for note in notes]


def _lack(trace: RoutingTrace, name: str, min_tokens: int) -> str:
    """What keeps a domain from being compared, or nothing."""
    lengths = sample_lengths(trace)
    of_domain = (sample_domains(trace) == trace.domains.index(name)) & (lengths > 0)
    tokens, samples = int(lengths[of_domain].sum()), int(of_domain.sum())
    if samples >= 2 and tokens >= min_tokens:
        return ""
    little = tokens < min_tokens
    way_out = "record more, or lower min_tokens" if little else "record shorter sequences"
    return (
        f"domain {name!r} has {tokens} tokens in {samples} sample{'s' * (samples != 1)}: too "
        f"little to compare, which needs {min_tokens} in 2 or more; {way_out}"
    )


def _list(names: list[str]) -> str:
    shown = [name or "''" for name in names[:12]]
    return ", ".join(shown) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
