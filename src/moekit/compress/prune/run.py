"""Pruning as a request: by a score or a search, checked before the model is touched."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from torch import Tensor

from moekit.compress.prune.evolution import eep, loss_points
from moekit.compress.prune.genome import MixedExperts, genome_plan
from moekit.compress.prune.naee import naee
from moekit.compress.prune.planning import Protect, Scope, plan_of, prune, rooms_of
from moekit.compress.prune.saliency import score
from moekit.compress.prune.weight_masks import mask_plan
from moekit.core.collect import Batch
from moekit.core.errors import UserError
from moekit.core.method_text import parse_method
from moekit.core.plan import ExpertPlan
from moekit.core.registry import Method, registry
from moekit.core.rewrite import Rewrite
from moekit.core.spec import MoESpec
from moekit.core.stats import ExpertStats, StatsLayer
from moekit.core.view import MoEView
from moekit.profile import profile

KINDS = ("saliency", "search", "sparsifier")
LITERAL = re.compile(r"[\"']([^\"']*)[\"']")
PLAIN_TYPES = {"int": int, "float": (int, float), "bool": bool, "str": str}


@dataclass(frozen=True)
class PruneRequest:
    """What is asked for: a method with options, the experts to keep by decoder layer, the scope.

    `domain` and `by_domain` are for scores; see `saliency.score`.
    """

    method: Method
    options: Mapping[str, Any]
    keep: Mapping[int, int]
    scope: Scope = "layer"
    domain: str | None = None
    by_domain: bool = False

    @property
    def searches(self) -> bool:
        """Whether the model is run for the decision, and not only for statistics."""
        return self.method.kind == "search"

    @property
    def masks(self) -> bool:
        """Whether weights go and all experts stay."""
        return self.method.kind == "sparsifier"

    @property
    def sets(self) -> tuple[str, ...]:
        """The sets of statistics that the method reads."""
        return ("diagonal",) if self.masks else ("default",)

    def check(self) -> None:
        """Raise `UserError` for what does not go together."""
        if self.scope not in get_args(Scope):
            raise UserError(f"--scope {self.scope!r} is none of {', '.join(get_args(Scope))}")
        if self.method.kind != "saliency" and (
            self.scope == "global" or self.domain or self.by_domain
        ):
            raise UserError(
                f"{self.method.name} is no score, and only scores take --scope global, --domain "
                "and --by-domain"
            )


@dataclass(frozen=True)
class Pruned:
    """A plan, what computes its values where it mixes experts, and numbers for record and card."""

    plan: ExpertPlan
    rewrite: Rewrite | None = None
    numbers: dict[str, Any] = field(default_factory=dict)


def method_of(text: str, seed: int) -> tuple[Method, dict[str, Any]]:
    """The score or search named by NAME or NAME:OPTION=VALUE,..., and its checked options.

    A method that takes a seed gets `seed` unless the text has one. Raises `UserError` for an
    unknown method, an option that it does not have, or a value of another type.
    """
    name, options = parse_method(text)
    methods = [m for kind in KINDS for m in registry.methods(kind=kind)]
    found = next((method for method in methods if method.name == name), None)
    if found is None:
        known = ", ".join(method.name for method in methods)
        raise UserError(f"--method {name!r} prunes nothing; there are {known}")
    known_options = {option.name: option for option in found.options}
    for key, value in options.items():
        if key not in known_options:
            there = ", ".join(known_options) or "none"
            raise UserError(f"--method {name} has no option {key!r}; there are {there}")
        wanted = known_options[key].type.split(" | ")[0]
        choices = LITERAL.findall(wanted) if wanted.startswith("Literal") else [value]
        if value not in choices:
            raise UserError(f"--method {name}: {key} is one of {', '.join(choices)}, not {value}")
        if not isinstance(value, PLAIN_TYPES.get(wanted, object)):  # type: ignore[arg-type]
            raise UserError(f"--method {name}: {key} is {wanted}, not {value!r}")
    if found.kind == "search" and "start" in options:
        registry.find(str(options["start"]), kind="saliency")
    if "seed" in known_options:
        options.setdefault("seed", seed)
    return found, options


def prune_by_score(
    spec: MoESpec, stats: ExpertStats, request: PruneRequest, protect: Protect
) -> Pruned:
    """Prune by a saliency; the numbers say which experts the calibration never reached."""
    plan = prune(
        spec,
        stats,
        request.method.name,
        request.keep,
        scope=request.scope,
        protect=protect,
        domain=request.domain,
        by_domain=request.by_domain,
        **request.options,
    )
    return Pruned(plan, numbers=_reach(stats, plan))


def prune_by_search(
    view: MoEView,
    spec: MoESpec,
    batches: Sequence[Batch | Tensor],
    request: PruneRequest,
    protect: Protect,
    *,
    state: Path | None = None,
    identity: Mapping[str, Any] | None = None,
    progress: Callable[[float, int], None] | None = None,
) -> Pruned:
    """Prune by a search that runs the model; `state` and `identity` let it go on (`SearchFile`)."""
    rooms = rooms_of(spec, request.keep, protect)
    known = {
        **(identity or {}),
        "text": _digest(batches),
        "keep": [room.count for room in rooms],
        "protected": [sorted(room.protected) for room in rooms],
    }
    common: dict[str, Any] = {"state": state, "identity": known, "progress": progress}
    if request.method.name == "naee":
        found = naee(view, batches, rooms, **common, **request.options)
        plan = plan_of(spec, rooms, found.keep, "prune: naee")
        numbers = {
            "layer errors": [round(error, 4) for error in found.errors],
            "subsets tried": found.evaluations,
            "within the budget": found.complete,
        }
        return Pruned(plan, numbers=numbers)
    options = dict(request.options)
    if "start" in options:
        first = score(profile(view, batches), options["start"])
        keep = [room.best(layer) for room, layer in zip(rooms, first, strict=True)]
        options["start"] = [keep]
    evolved = eep(rooms, loss_points(view, rooms, batches), **common, **options)
    plan = genome_plan(spec, rooms, evolved.best)
    numbers = {
        "nats a token, first": -evolved.history[0] / 100,
        "nats a token, best": -evolved.fitness / 100,
        "models tried": evolved.evaluations,
        "within the budget": evolved.complete,
    }
    return Pruned(plan, MixedExperts(plan) if plan.fit else None, numbers)


def prune_weights(
    spec: MoESpec,
    stats: ExpertStats,
    request: PruneRequest,
    protect: Protect,
    directory: Path | None = None,
) -> Pruned:
    """Zero weights of all but protected experts; `directory` is where the plan finds the stats."""
    plan = mask_plan(spec, request.method.name, request.options, protect, directory)
    return Pruned(plan, request.method.load()(plan, stats, **request.options))


def _digest(batches: Sequence[Batch | Tensor]) -> str:
    """What tells one text from another: a hash of its tokens."""
    digest = hashlib.sha256()
    for batch in batches:
        ids = batch if isinstance(batch, Tensor) else batch.ids
        digest.update(repr(ids.tolist()).encode())
    return digest.hexdigest()[:16]


def without_stats(spec: MoESpec) -> ExpertStats:
    """Statistics of no text, for methods that need none."""
    layers = [
        StatsLayer(
            layer.layer_index,
            layer.path,
            layer.num_experts,
            layer.num_experts + layer.num_null_experts,
            layer.top_k,
        )
        for layer in spec.per_layer
    ]
    return ExpertStats(spec.model_type, layers, [])


def _reach(stats: ExpertStats, plan: ExpertPlan) -> dict[str, Any]:
    """Tokens, and the experts that none of them chose: all, and those that stay nevertheless."""
    if not all(stats.has(position, "count") for position in range(len(stats.layers))):
        return {}
    never: dict[str, list[int]] = {}
    staying = 0
    for position, layer in enumerate(stats.layers):
        counts = stats.counts(position)[: layer.num_experts]
        unreached = (counts == 0).nonzero().flatten().tolist()
        if unreached:
            never[str(layer.index)] = unreached
        staying += len(set(unreached) - set(plan.dropped(layer.index)))
    return {
        "tokens": max(stats.num_tokens(position) for position in range(len(stats.layers))),
        "never chosen": never,
        "never chosen but kept": staying,
    }
