"""Groups by agglomerative clustering. E experts."""

from __future__ import annotations

from moekit.compress.condense.agglomerate import LINKAGES, agglomerate
from moekit.compress.condense.context import Groups, LayerContext, by_leader
from moekit.compress.condense.features import distances
from moekit.core.errors import UserError
from moekit.core.registry import register


@register(
    "grouping",
    "hierarchical",
    title="Agglomerative clustering: the two nearest groups become one, again and again",
    paper="HC-SMoE 2410.08589",
    needs=("data",),
    options={
        "feature": "what near means: router-logits, mean-output, output, output-cosine or weights",
        "linkage": "distance of two groups from those of their experts: average, single, complete",
    },
)
def hierarchical(
    context: LayerContext,
    count: int,
    *,
    feature: str = "mean-output",
    linkage: str = "average",
) -> Groups:
    """Form `count` groups. Raises UserError for an unknown linkage or feature."""
    if linkage not in LINKAGES:
        raise UserError(f"no linkage is called {linkage!r}; there are {', '.join(LINKAGES)}.")
    groups = agglomerate(distances(context, feature), count, linkage)
    return Groups(by_leader(context, groups))
