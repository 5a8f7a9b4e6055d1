"""EEP: evolution of what experts to keep and how to mix the others into them, by inference alone.

Every individual is made from a generator keyed by its number and from the fitness of those before
it, so a state file needs to hold nothing but the fitness of each to go on where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Generator, Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from moekit.compress.live import apply_live
from moekit.compress.prune.budget import Budget, SearchFile
from moekit.compress.prune.genome import Genome, LayerGenome, MixedExperts, genome_plan
from moekit.compress.prune.select import Room
from moekit.core.collect import Batch
from moekit.core.registry import register
from moekit.core.seeds import generator
from moekit.core.spec import spec_of
from moekit.core.view import MoEView

# The paper's settings. Points are those of the fitness.
REPICK = 0.15
CROSSOVER = 0.3
FROM_FIRST = 0.6
CROSSOVER_POINTS, CROSSOVER_LEAST = 1.0, 6
MUTATION_POINTS = 3.0
ELEMENT, NOISE = 0.25, 0.065
LAYER = 0.25
RESCALE = 0.1


@dataclass(frozen=True)
class Evolved:
    """The best individual, its fitness, the best fitness after each evaluation, and the spending.

    `complete` is False where a budget ended the search early.
    """

    best: Genome
    fitness: float
    history: list[float]
    evaluations: int
    complete: bool


@register(
    "search",
    "eep",
    title="Evolution of the experts to keep and of how the others are mixed into them",
    paper="EEP 2407.00945",
    needs=("weights", "data"),
    limits="Hundreds of evaluations of the whole model. Router rows are mixed in place of router "
    "probabilities, so that stock classes hold the result.",
    options={
        "initial": "random subsets to begin with",
        "pruning": "individuals after which subsets are done and mixing begins",
        "total": "individuals in all; equal to pruning for subsets only",
        "start": "keep sets to begin with; on the command line the name of a score",
        "max_seconds": "time for all of them",
        "seed": "seed of all choices",
    },
)
def eep(
    rooms: Sequence[Room],
    evaluate: Callable[[Genome], float],
    *,
    initial: int = 30,
    pruning: int = 100,
    total: int = 400,
    start: Sequence[Sequence[Sequence[int]]] = (),
    max_seconds: float | None = None,
    seed: int = 0,
    state: Path | None = None,
    identity: dict[str, Any] | None = None,
    progress: Callable[[float, int], None] | None = None,
) -> Evolved:
    """Maximise `evaluate(genome)`, whose unit are the points that the paper's selection counts in.

    `rooms` say what each layer keeps. `start` are keep sets by layer that come before the random
    ones, say of a score. `state` is a file from which a search of the same `identity` goes on;
    `progress` gets (evaluations done, all).
    """
    plan = _Phases(initial, pruning, [[list(map(int, keep)) for keep in own] for own in start])
    sizes = {"initial": initial, "pruning": pruning, "total": total, "seed": seed}
    known_as = {"method": "eep", **sizes, "start": plan.start, **(identity or {})}
    file = SearchFile(state, known_as)
    known: list[float] = (file.load() or {"fitness": []})["fitness"]
    budget = Budget(seconds=max_seconds)
    people: list[Genome] = []
    fitness: list[float] = []
    for number in range(total):
        # Past the budget what was evaluated before is still counted in.
        if number >= max(len(known), 1) and budget.exhausted:
            break
        person = plan.person(number, rooms, people, fitness, generator(seed, "eep", number))
        people.append(person)
        if number < len(known):
            fitness.append(known[number])
            continue
        budget.spent += 1
        fitness.append(evaluate(person))
        file.save({"fitness": fitness})
        if progress is not None:
            progress(number + 1, total)
    best = max(range(len(people)), key=lambda i: fitness[i])
    history = [max(fitness[: i + 1]) for i in range(len(fitness))]
    return Evolved(people[best], fitness[best], history, budget.spent, len(people) == total)


@dataclass(frozen=True)
class _Phases:
    """How the individual of a number comes about: given, random, re-picked, crossed or shaken."""

    initial: int
    pruning: int
    start: list[list[list[int]]]

    def person(
        self,
        number: int,
        rooms: Sequence[Room],
        people: Sequence[Genome],
        fitness: Sequence[float],
        rng: Generator,
    ) -> Genome:
        if number < len(self.start):
            return [
                LayerGenome.keeping(room, keep)
                for room, keep in zip(rooms, self.start[number], strict=True)
            ]
        if number < max(self.initial, 1):
            return [
                LayerGenome.keeping(room, room.best(torch.rand(room.num_experts, generator=rng)))
                for room in rooms
            ]
        if number < self.pruning:
            return _repicked(rooms, _parent(people, fitness, MUTATION_POINTS, 1, rng), rng)
        if float(torch.rand((), generator=rng)) < CROSSOVER:
            one, other = (
                _parent(people, fitness, CROSSOVER_POINTS, CROSSOVER_LEAST, rng) for _ in range(2)
            )
            return [_crossed(*layers, rng) for layers in zip(one, other, strict=True)]
        parent = _parent(people, fitness, MUTATION_POINTS, 1, rng)
        return [_shaken(room, layer, rng) for room, layer in zip(rooms, parent, strict=True)]


def loss_points(
    view: MoEView, rooms: Sequence[Room], batches: Sequence[Batch | Tensor]
) -> Callable[[Genome], float]:
    """A fitness: minus 100 times the mean nats of the next token of `batches`.

    So a point is 0.01 nats; the paper's points are percents of a task's metric.
    """
    spec = spec_of(cast(PreTrainedModel, view.model))

    def evaluate(genome: Genome) -> float:
        plan = genome_plan(spec, rooms, genome)
        with apply_live(view, plan, MixedExperts(plan) if plan.fit else None):
            return -100 * token_loss(view.model, batches)

    return evaluate


@torch.no_grad()
def token_loss(model: Any, batches: Sequence[Batch | Tensor]) -> float:
    """Mean nats of the tokens of `batches` that follow another one; padding does not count."""
    nats, count = 0.0, 0
    for batch in batches:
        ids, mask = (batch, None) if isinstance(batch, Tensor) else (batch.ids, batch.mask)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        scored = torch.ones_like(ids) if mask is None else mask
        targets = ids[:, 1:].masked_fill(scored[:, 1:] == 0, -100)
        losses = cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")
        nats += float(losses)
        count += int((targets >= 0).sum())
    return nats / count


def _parent(
    people: Sequence[Genome], fitness: Sequence[float], points: float, least: int, rng: Generator
) -> Genome:
    """One at random of those within `points` of the best, who are at least the `least` best.

    Ties are in random order.
    """
    order = torch.randperm(len(people), generator=rng).tolist()
    ranked = sorted(order, key=lambda i: -fitness[i])
    near = sum(fitness[i] >= fitness[ranked[0]] - points for i in ranked)
    chosen = int(torch.randint(min(len(ranked), max(near, least)), (), generator=rng))
    return people[ranked[chosen]]


def _repicked(rooms: Sequence[Room], parent: Genome, rng: Generator) -> Genome:
    """Each row takes, now and then, an expert of its group that no row has."""
    made = []
    for room, layer in zip(rooms, parent, strict=True):
        slots = list(layer.slots)
        for row, slot in enumerate(slots):
            free = [e for e in room.gone(slots) if room.group_of(e) == room.group_of(slot)]
            again = float(torch.rand((), generator=rng)) < REPICK
            if again and free and slot not in room.protected:
                slots[row] = free[int(torch.randint(len(free), (), generator=rng))]
        rows = torch.eye(room.num_experts)[slots]
        made.append(LayerGenome(tuple(slots), rows, rows))
    return made


def _crossed(first: LayerGenome, second: LayerGenome, rng: Generator) -> LayerGenome:
    """Rows of two parents; a matrix that is not selected comes whole from one of them."""
    parents = (first, second)
    whole = torch.rand((), generator=rng) < 0.5
    from_first = torch.rand(len(first.slots), generator=rng) < FROM_FIRST
    matrices = []
    for name in ("experts", "router"):
        one, other = (getattr(parent, name) for parent in parents)
        if float(torch.rand((), generator=rng)) < LAYER:
            matrices.append(torch.where(from_first[:, None], one, other))
        else:
            matrices.append(one if bool(whole) else other)
    return LayerGenome((first if bool(whole) else second).slots, *matrices).named()


def _shaken(room: Room, layer: LayerGenome, rng: Generator) -> LayerGenome:
    """Noise on some elements of the matrices that are selected."""
    fixed = torch.tensor([slot in room.protected for slot in layer.slots])
    experts, router = (
        _with_noise(matrix, fixed, rng) if float(torch.rand((), generator=rng)) < LAYER else matrix
        for matrix in (layer.experts, layer.router)
    )
    if float(torch.rand((), generator=rng)) < RESCALE:
        total = experts.sum(1, keepdim=True)
        # A row that sums to nothing has no scale.
        experts = experts.where(total.abs() < 0.1, experts / total)
    return LayerGenome(layer.slots, experts, router)


def _with_noise(matrix: Tensor, fixed: Tensor, rng: Generator) -> Tensor:
    noise = NOISE * torch.randn(matrix.shape, generator=rng)
    hit = (torch.rand(matrix.shape, generator=rng) < ELEMENT) & ~fixed[:, None]
    return matrix + noise * hit
