"""What `moekit compress prune` keeps whatever a score says: protected experts, those of a task."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from moekit.cli.common import Dtype, Output, open_model
from moekit.core.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from moekit.compress.prune.run import Pruned
    from moekit.core.spec import MoESpec

SUPER = "super"


def check_library(
    task: str | None, query: str | None, stats: Path | None, data: list[str] | None
) -> None:
    """Refuse what does not go with a library."""
    if (task is None) == (query is None):
        raise UserError("--library needs --task, a name, or --query, a text to find the task by")
    if stats is not None or data:
        raise UserError("--library holds what was measured; --stats and --data are for a method")


def from_library(
    printed: Output,
    model: str,
    spec: MoESpec,
    keep: Mapping[int, int],
    library: Path,
    task: str | None,
    query: str | None,
    seed: int,
    threads: int | None,
    protected: dict[int, set[int]],
) -> Pruned:
    """Keep what a task needs, named or found by a text."""
    from moekit.compress.prune.library import TaskLibrary
    from moekit.compress.prune.planning import plan_of, rooms_of
    from moekit.compress.prune.run import Pruned

    tasks = TaskLibrary.load(library)
    tasks.check(spec)
    distances: list[tuple[str, float]] = []
    if query is not None:
        from moekit.core.view import MoEView

        loaded = open_model(model, Dtype.auto, seed, threads)
        ids = loaded.tokenizer(query, return_tensors="pt")["input_ids"]
        distances = tasks.nearest(tasks.key_of(MoEView(loaded.model), [ids]))
        printed.table(
            [(name, f"{distance:.4f}") for name, distance in distances],
            header=("task", "distance"),
        )
        task = distances[0][0]
    assert task is not None
    rooms = rooms_of(spec, keep, protected)
    plan = plan_of(spec, rooms, tasks.keep(task, rooms), f"prune: task {task}")
    return Pruned(plan, numbers={"task": task, "distances": dict(distances)})


def protected_experts(texts: list[str]) -> dict[int, set[int]]:
    """Experts by decoder layer from plans and LAYER:EXPERT; "super" is found out later."""
    from moekit.core.plan import ExpertPlan

    found: dict[int, set[int]] = {}
    for text in texts:
        layer, colon, expert = text.partition(":")
        if text == SUPER:
            continue
        if colon and layer.isdigit() and expert.isdigit():
            found.setdefault(int(layer), set()).add(int(expert))
            continue
        if not Path(text).exists():
            raise UserError(
                f"--protect {text!r} is neither super, nor a file, nor LAYER:EXPERT as 3:17"
            )
        for index, actions in ExpertPlan.load(text).layers.items():
            found.setdefault(index, set()).update(e for e, a in actions.items() if a.protect)
    return found


def super_experts_of(view: Any, batches: list[Any]) -> list[tuple[int, int]]:
    """Decoder layer and id of the experts behind the model's massive activations."""
    from moekit.analyze.super_experts import super_experts
    from moekit.core.collect import collect

    with view.trace() as trace:
        collect(view, batches, [])
    found: list[tuple[int, int]] = super_experts(trace, view, sinks=False).detail["super_experts"]
    return found
