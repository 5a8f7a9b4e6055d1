"""The published methods of merging experts: each a row of what `condense_plan` combines."""

from __future__ import annotations

from typing import Any

from moekit.compress.condense.condense import Recipe
from moekit.core.registry import register_preset, registry

KIND = "condenser"
NO_TRAINING = "Without the training that the paper ends with."

# name: title, paper, limits, fields of `Recipe`
METHODS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "m-smoe": (
        "The most used experts absorb those with like router logits, neurons aligned",
        "M-SMoE 2310.01334",
        NO_TRAINING,
        {"grouping": "dominant", "align": "weights"},
    ),
    "mc-smoe": (
        "M-SMoE, then every matrix as low rank plus sparse rows",
        "MC-SMoE 2310.01334",
        NO_TRAINING,
        {"grouping": "dominant", "align": "weights", "fuser": "low-rank-sparse"},
    ),
    "hc-smoe": (
        "Hierarchical clustering of mean outputs, averages by frequency",
        "HC-SMoE 2410.08589",
        "",
        {},
    ),
    "dern": (
        "Drop the experts of least gate mass and hand their neurons to like ones",
        "DERN 2509.10377",
        "",
        {"grouping": "drop", "fuser": "recombine", "importance": "dern", "router": "slice"},
    ),
    "uncurl": (
        "Spectral clustering of router logits, neurons aligned, averages by frequency",
        "UNCURL 2409.01483",
        NO_TRAINING,
        {"grouping": "spectral", "align": "weights"},
    ),
    "sub-moe": (
        "Clusters of like outputs, averaged in the space that they share",
        "Sub-MoE 2506.23266",
        "Clusters by average linkage instead of k-means.",
        {
            "grouping": "hierarchical",
            "grouping_options": {"feature": "output-cosine"},
            "fuser": "subspace",
        },
    ),
    "reap-merge": (
        "REAP's survivors absorb the experts with like outputs, weighed by saliency",
        "REAM 2604.04356",
        "Grouping and shares as that paper's outline has them; its details were not at hand.",
        {
            "grouping": "dominant",
            "grouping_options": {"feature": "output-cosine"},
            "importance": "reap",
            "shares": "reap",
            "align": "activations",
        },
    ),
    "fisher-merge": (
        "HC-SMoE's groups, averages weighted by Fisher information",
        "Fisher merging 2111.09832",
        "",
        {"fuser": "fisher", "shares": "uniform"},
    ),
    "zip-merge": (
        "HC-SMoE's groups, neurons merged wherever they are alike",
        "ZipIt 2305.03053",
        "",
        {"fuser": "zip"},
    ),
    "pleas": (
        "HC-SMoE's groups, aligned by activations, the down projection refitted",
        "PLeaS 2407.02447",
        "",
        {"fuser": "least-squares", "align": "activations"},
    ),
    "random-merge": (
        "Random groups, averages by frequency: what any merging must beat",
        "",
        "",
        {"grouping": "random"},
    ),
    "frequency-merge": (
        "The most used experts absorb the others without comparing any",
        "",
        "",
        {"grouping": "frequency"},
    ),
}

for _name, (_title, _paper, _limits, _settings) in METHODS.items():
    register_preset(
        Recipe,
        _name,
        kind=KIND,
        title=_title,
        paper=_paper,
        needs=("weights", "data"),
        limits=_limits,
        settings=_settings,
    )


def recipe_of(name: str, **changes: Any) -> Recipe:
    """The recipe of a published method with some fields changed; `UserError` for another name."""
    method = registry.find(name, kind=KIND)
    fields = {**method.settings, **changes}
    for options in ("grouping_options", "fuser_options"):
        # Options of the method's own grouping or fuser mean nothing to another one.
        kind = options.partition("_")[0]
        own = changes.get(kind, method.settings.get(kind)) == method.settings.get(kind)
        inherited = method.settings.get(options, {}) if own else {}
        fields[options] = {**inherited, **changes.get(options, {})}
    return Recipe(**fields)
