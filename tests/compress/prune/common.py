"""Small models and statistics that the tests of pruning share."""

from __future__ import annotations

import torch

from moekit.core.collect import Batch
from moekit.core.stats import ExpertStats, StatsLayer
from moekit.core.stats_table import DEFAULT_MOMENTS
from moekit.core.view import MoEView
from moekit.profile import profile
from tests.families.tiny import VOCAB, build_tiny


def tokens(rows: int = 4, length: int = 24, seed: int = 0) -> Batch:
    """Random tokens of two domains, half of the rows each."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
    return Batch(ids, None, ["a", "b"] * (rows // 2))


def tiny_view(family: str = "qwen3_moe", **changes: object) -> MoEView:
    """The tiny model of a family, with some fields of its config changed."""
    if not changes:
        return MoEView(build_tiny(family))
    from tests.families.tiny import TINY

    config = TINY[family]()
    for name, value in changes.items():
        setattr(config, name, value)
    return MoEView(build_tiny(family, config=config))


def tiny_stats(view: MoEView) -> ExpertStats:
    return profile(view, [tokens()])


def made_stats(counts: list[list[float]], gates: float = 0.5, norms: float = 2.0) -> ExpertStats:
    """Stats whose tokens all have the same gate and norm: only the counts [L][E] differ."""
    layers = [StatsLayer(i, f"layers.{i}", len(c), len(c), 2) for i, c in enumerate(counts)]
    stats = ExpertStats("made", layers, ["a"], {"moments": [list(m) for m in DEFAULT_MOMENTS]})
    for position, layer_counts in enumerate(counts):
        count = torch.tensor(layer_counts, dtype=torch.float64)
        moments = [count * gates**m.gate * norms**m.norm for m in DEFAULT_MOMENTS]
        stats.held[position, "count"] = count.long().unsqueeze(0)
        stats.held[position, "tokens"] = torch.tensor([int(count.sum())])
        stats.held[position, "moments"] = torch.stack(moments, -1).unsqueeze(0)
    return stats
