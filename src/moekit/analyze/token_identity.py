"""How far the token's identity alone decides its experts, and how far its context does."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moekit.analyze.reading import (
    Ids,
    Piece,
    check_filled,
    count_by_group,
    pieces,
    rows_of,
)
from moekit.analyze.result import Result
from moekit.core.errors import UserError
from moekit.core.registry import register
from moekit.core.seeds import derive_seed
from moekit.core.trace import RoutingTrace

EARLY = 16
MOST_GROUPS = 2**15


@register(
    "measure",
    "token-identity",
    title="Dependence of the experts on token identity, on its neighbour and on position",
    paper="OpenMoE 2402.01739",
    needs=("trace",),
    options={
        "max_tokens": "tokens read, in whole samples spread evenly",
        "seed": "seed of the shuffled comparison",
    },
)
def token_identity(trace: RoutingTrace, *, max_tokens: int = 2**18, seed: int = 0) -> Result:
    """Measure the share of experts that two occurrences of the same token have in common.

    Every score is (share - chance) / (1 - chance), chance being any two tokens: 1 for a router that
    looks at the token id only, 0 for one that does not look at it. `token` compares occurrences of
    a token id, `pair` those with the same token before too, so `pair` - `token` is what the nearest
    context adds; `position` compares equal positions. `early` and `late` are `token` within the
    first 16 positions and after them. `shuffled` is `token` with the ids in random order.
    Raises UserError for a trace without token ids, or without a token that occurs twice.
    """
    check_filled(trace)
    chosen = pieces(trace, max_tokens, length=max_tokens)
    rows = rows_of(chosen)
    groupings = _groupings(trace, chosen, rows, seed)
    table = []
    for position, layer in enumerate(trace.layers):
        scores = [_score(trace, position, groups, rows) for groups in groupings.values()]
        table.append((layer.index, *scores))
    columns = ("layer", *groupings)
    means = {
        name: float(np.nanmean(values)) if not np.isnan(values).all() else float("nan")
        for name, values in (
            (name, np.array([row[i + 1] for row in table])) for i, name in enumerate(groupings)
        )
    }
    return Result(
        columns,
        table,
        {
            "tokens": len(rows),
            **means,
            "context": means["pair"] - means["token"],
            "late_minus_early": means["late"] - means["early"],
        },
    )


def _groupings(
    trace: RoutingTrace, chosen: list[Piece], rows: Ids, seed: int
) -> dict[str, NDArray[np.int64]]:
    """Group numbers [N] of every token of the trace, -1 outside of any group, by grouping."""
    tokens = trace.tokens.numpy()
    if (tokens[rows] < 0).all():
        raise UserError("the trace has no token ids (it was recorded from embeddings)")
    where = np.full(len(trace), -1)
    for piece in chosen:
        where[piece.start : piece.stop] = np.arange(len(piece)) + piece.position
    known = (tokens >= 0) & (where >= 0)
    before = np.roll(tokens, 1)
    random = np.random.default_rng(derive_seed(seed, "token-identity"))
    shuffled = np.where(known, tokens, -1)
    shuffled[known] = random.permutation(tokens[known])
    with_pair = known & (where > 0) & (before >= 0)
    pair = before.astype(np.int64) << 32 | tokens
    groupings = {
        "token": np.where(known, tokens, -1),
        "pair": np.where(with_pair, pair, -1),
        "position": np.where(known, where, -1),
        "early": np.where(known & (where < EARLY), tokens, -1),
        "late": np.where(known & (where >= EARLY), tokens, -1),
        "shuffled": shuffled,
    }
    numbered = {name: _numbered(keys) for name, keys in groupings.items()}
    if numbered["token"].max() < 0:
        raise UserError(f"none of the {len(rows)} tokens read occurs twice: record more text")
    return numbered


def _numbered(keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """Number the most frequent keys that occur twice or more; -1 for the others."""
    values, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
    counts[values < 0] = 0
    order = np.argsort(-counts, kind="stable")[:MOST_GROUPS]
    order = order[counts[order] >= 2]
    number = np.full(len(values), -1)
    number[order] = np.arange(len(order))
    return number[inverse]


def _score(trace: RoutingTrace, position: int, groups: Ids, rows: Ids) -> float:
    num_groups = int(groups.max()) + 1
    if not num_groups:
        return float("nan")
    counts = count_by_group(trace, position, groups, num_groups, rows).astype(np.float64)
    members = np.bincount(groups[groups >= 0], minlength=num_groups).astype(np.float64)
    used = counts.sum(1)
    # Pairs of different occurrences only, or every rare token would look faithful to its experts.
    same = (counts * (counts - 1)).sum(1) / np.maximum(used * (members - 1), 1)
    total = counts.sum(0)
    chance = (total * (total - 1)).sum() / max(used.sum() * (members.sum() - 1), 1)
    if not used.any() or chance > 1 - 1e-9:
        return float("nan")
    return float((np.average(same, weights=used) - chance) / (1 - chance))
