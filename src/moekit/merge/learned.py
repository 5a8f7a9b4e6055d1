"""Coefficients learned from text: AdaMerging, and FW-Merging hard and soft.

All of them end as weights of the base and the models, tensor by tensor. Shapes: M tensors, V
vertices (the base, then the models), N directions.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moekit.core.errors import UserError
from moekit.core.seeds import generator
from moekit.merge.consensus import Consensus
from moekit.merge.job import MergeMethod, Rows, TensorJob
from moekit.merge.magnitude import kept
from moekit.merge.mixture import LOSSES, Mixture
from moekit.merge.preparation import COEFFICIENTS_FILE, Preparation
from moekit.merge.task_vectors import task_vector_blocks
from moekit.merge.whole_model import whole_model_rules

GRANULARITIES = ("layer", "task")
ORACLES = ("inner", "cosine")


@dataclasses.dataclass
class Learner:
    """The mixture that is learned, the text of its models, and the options of the method."""

    mixture: Mixture
    text: Mapping[str, Sequence[Tensor]]
    options: Mapping[str, Any]
    room: Preparation
    seed: int

    @classmethod
    def of(cls, jobs: Mapping[str, TensorJob], room: Preparation) -> Learner:
        first = next(iter(jobs.values()))
        models = [model for model, _ in first.origins]
        for job in jobs.values():
            if [model for model, _ in job.origins] != models or job.base_origin != (
                room.recipe.base,
                job.name,
            ):
                raise UserError(
                    f"{room.recipe.method} learns whole models: give models, not slices of them."
                )
        for key, values in (
            ("granularity", GRANULARITIES),
            ("loss", LOSSES),
            ("oracle", ORACLES),
            ("start", ("average", "base")),
        ):
            if key in first.options and first.options[key] not in values:
                raise UserError(f"{key} is {first.options[key]!r}; there are {', '.join(values)}.")
        text = {model: room.sequences(model) for model in dict.fromkeys(models)}
        assert first.base_origin is not None
        mixture = Mixture(room.model(first.base_origin[0]), jobs)
        return cls(mixture, text, first.options, room, room.seed)

    def losses(self, step: int, models: Sequence[str] | None = None) -> float:
        """The loss over a drawn batch of each model's text, added to the mixture; their mean."""
        wanted = list(self.text) if models is None else list(models)
        total = 0.0
        for model in wanted:
            sequences = self.text[model]
            draw = generator(self.seed, f"batch of {model}", step)
            count = min(int(self.options["batch"]), len(sequences))
            places = torch.randperm(len(sequences), generator=draw)[:count].tolist()
            batch = [sequences[place] for place in places]
            total += self.mixture.add_loss(batch, self.options["loss"], 1 / len(wanted))
        return total / len(wanted)

    def descend(
        self, start: Tensor, directions: Tensor, init: float, steps: int, name: str
    ) -> Tensor:
        """Weights [M, V]: start + sum_n c_n * directions_n [N, M, V] with c in [0, 1] by Adam.

        One coefficient for each tensor and direction, or for each direction. The state is kept
        after every step, so that an interrupted run goes on.
        """
        layers = self.options.get("granularity", "layer") == "layer"
        shape = (self.mixture.shape[0] if layers else 1, len(directions))
        learned = torch.full(shape, init, dtype=torch.float64, requires_grad=True)
        adam = torch.optim.Adam([learned], lr=float(self.options["lr"]))
        state, done = self.room.state(name), 0
        if state.exists():
            done = _restore(json.loads(state.read_text()), learned, adam)
        for step in range(done, steps):
            inside = learned.detach().clamp(0, 1)
            self.mixture.set(start + _along(inside.expand(len(start), -1), directions))
            loss = self.losses(step)
            by_weight = self.mixture.pull()
            gradient = torch.einsum("mv,nmv->mn", by_weight, directions)
            gradient = gradient if layers else gradient.sum(0, keepdim=True)
            # As the clamp's own derivative: nothing pulls beyond its ends.
            learned.grad = gradient * ((learned >= 0) & (learned <= 1))
            adam.step()
            _save(state, step + 1, learned, adam)
            self.room.told(f"{name}, {self.options['loss']} {loss:.4f}", step + 1, steps)
        inside = learned.detach().clamp(0, 1).expand(self.mixture.shape[0], -1)
        return start + _along(inside, directions)

    def one_hot(self, vertex: int) -> Tensor:
        weights = torch.zeros(self.mixture.shape, dtype=torch.float64)
        weights[:, vertex] = 1
        return weights


def _along(shares: Tensor, directions: Tensor) -> Tensor:
    """Shares [M, N] of directions [N, M, V], [M, V]."""
    return torch.einsum("mn,nmv->mv", shares, directions)


def _save(path: Path, done: int, learned: Tensor, adam: torch.optim.Adam) -> None:
    held = adam.state[learned]
    content = {
        "done": done,
        "learned": learned.tolist(),
        "first": held["exp_avg"].tolist(),
        "second": held["exp_avg_sq"].tolist(),
    }
    _keep(path, content)


def _keep(path: Path, content: Mapping[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content))
    temporary.replace(path)


def _restore(content: Mapping[str, Any], learned: Tensor, adam: torch.optim.Adam) -> int:
    with torch.no_grad():
        learned.copy_(torch.tensor(content["learned"], dtype=torch.float64))
    adam.state[learned] = {
        "step": torch.tensor(float(content["done"])),
        "exp_avg": torch.tensor(content["first"], dtype=torch.float64),
        "exp_avg_sq": torch.tensor(content["second"], dtype=torch.float64),
    }
    return int(content["done"])


def adamerging(jobs: Mapping[str, TensorJob], room: Preparation) -> dict[str, TensorJob]:
    """Coefficients of the task vectors by Adam on the loss over every model's text (2310.02575).

    `density` below 1 is AdaMerging++: task vectors trimmed over the whole model, and only their
    entries of the elected sign.
    """
    density = float(next(iter(jobs.values())).options["density"])
    jobs = _elected(jobs, density, room) if density < 1 else jobs
    learner = Learner.of(jobs, room)
    base = learner.one_hot(0)
    directions = [learner.one_hot(v) - base for v in range(1, learner.mixture.shape[1])]
    options = learner.options
    found = learner.descend(
        base, torch.stack(directions), float(options["init"]), int(options["steps"]), "adamerging"
    )
    return _with_weights(jobs, found, room)


def fw_hard(jobs: Mapping[str, TensorJob], room: Preparation) -> dict[str, TensorJob]:
    """The weights that `frank_wolfe` finds from text."""
    return _with_weights(jobs, frank_wolfe(Learner.of(jobs, room)), room)


def frank_wolfe(learner: Learner) -> Tensor:
    """Weights [M, V] by Frank-Wolfe over the hull of the models (2503.12649).

    Each step goes towards the vertex that the gradient of the loss points to, by 2 / (step + 2) *
    step_size. `granularity` task moves the whole model to one vertex, layer each tensor to its own.
    Where no vertex promises less than where it stands, nothing moves. Goes on where an interrupted
    run stopped.
    """
    steps = int(learner.options["steps"])
    weights, done, state = _start(learner), 0, learner.room.state("fw_hard")
    if state.exists():
        held = json.loads(state.read_text())
        weights, done = torch.tensor(held["weights"], dtype=torch.float64), held["done"]
    for step in range(done, steps):
        learner.mixture.set(weights)
        loss = learner.losses(step)
        share = 2 / (step + 2) * float(learner.options["step_size"])
        for tensor, vertex in enumerate(_vertices(learner, weights)):
            if vertex is not None:
                weights[tensor] *= 1 - share
                weights[tensor, vertex] += share
        _keep(state, {"done": step + 1, "weights": weights.tolist()})
        learner.room.told(f"fw_hard, {learner.options['loss']} {loss:.4f}", step + 1, steps)
    return weights


def fw_soft(jobs: Mapping[str, TensorJob], room: Preparation) -> dict[str, TensorJob]:
    """The models that the gradients of single texts point to, moved to by learned coefficients."""
    learner = Learner.of(jobs, room)
    weights = _start(learner)
    for step in range(int(learner.options["steps"])):
        chosen = []
        learner.mixture.set(weights)
        for model in learner.text:
            learner.losses(step, [model])
            chosen.append(_vertex_of_all(learner, weights))
        vertices = list(dict.fromkeys(v for v in chosen if v is not None))
        if not vertices:
            break
        directions = torch.stack([learner.one_hot(v) - weights for v in vertices])
        weights = learner.descend(
            weights,
            directions,
            # As published: after the first round coefficients begin at almost nothing.
            float(learner.options["init"]) if step == 0 else 1e-8,
            int(learner.options["inner_steps"]),
            f"fw_soft round {step + 1}",
        )
    return _with_weights(jobs, weights, room)


def _start(learner: Learner) -> Tensor:
    if learner.options["start"] == "base":
        return learner.one_hot(0)
    count = learner.mixture.shape[1] - 1
    total = sum(learner.one_hot(vertex) for vertex in range(1, count + 1))
    assert isinstance(total, Tensor)
    return total / count


def _vertices(learner: Learner, weights: Tensor) -> list[int | None]:
    """For every tensor the vertex to move to."""
    if learner.options["granularity"] == "task":
        return [_vertex_of_all(learner, weights)] * learner.mixture.shape[0]
    scores, stay = _scores(learner, weights)
    found = scores[:, 1:].min(dim=1)
    return [
        int(vertex) + 1 if float(value) < float(here) else None
        for value, vertex, here in zip(found.values, found.indices, stay, strict=True)
    ]


def _vertex_of_all(learner: Learner, weights: Tensor) -> int | None:
    scores, stay = _scores(learner, weights)
    total = scores[:, 1:].sum(0)
    vertex = int(total.argmin())
    return vertex + 1 if float(total[vertex]) < float(stay.sum()) else None


def _scores(learner: Learner, weights: Tensor) -> tuple[Tensor, Tensor]:
    """What the gradient makes of every vertex [M, V] and of staying [M]; less is better."""
    cosine = learner.options["oracle"] == "cosine"
    pulled = learner.mixture.pull(cosine)
    # The published cosines have no value of their own for where the model stands.
    return pulled, torch.zeros(len(pulled)) if cosine else (pulled * weights).sum(1)


def _elected(
    jobs: Mapping[str, TensorJob], density: float, room: Preparation
) -> dict[str, TensorJob]:
    """Jobs whose models keep the largest entries of their task vectors with the elected sign."""
    every = list(jobs.values())
    count = len(every[0].tensors)
    rules = whole_model_rules(every, [density] * count)
    vote = Consensus()

    def trimmed(model: int) -> dict[str, Tensor]:
        made = {}
        for name, job in jobs.items():
            blocks = []
            base = job.cast(job.base)
            streams = [
                rule.masked(task_vector_blocks(base, job.tensors[n], job.block_rows))
                for n, rule in enumerate(rules)
            ]
            for parts in zip(*streams, strict=True):
                values = [kept(block, mask).float() for block, mask, _ in parts]
                sign = vote.elect(values)
                blocks.append((values[model] * sign).clamp_(min=0) * sign)
            delta = torch.cat(blocks) if job.shape else blocks[0]
            made[name] = job.whole(job.base).float() + delta
        return made

    stored = [room.kept(f"elected-{n}", partial(trimmed, n)) for n in range(count)]
    return {
        name: dataclasses.replace(job, tensors=[one[name] for one in stored])
        for name, job in jobs.items()
    }


def _with_weights(
    jobs: Mapping[str, TensorJob], weights: Tensor, room: Preparation
) -> dict[str, TensorJob]:
    table = dict(zip(jobs, weights.tolist(), strict=True))
    models = [room.recipe.base, *(model for model, _ in next(iter(jobs.values())).origins)]
    room.files[COEFFICIENTS_FILE] = json.dumps({"models": models, "tensors": table}, indent=1)
    return {
        name: dataclasses.replace(job, options={**job.options, "mixture": table[name]})
        for name, job in jobs.items()
    }


def mixture_rows(job: TensorJob) -> Rows:
    """The weighted sum of the base and the models."""
    for start, stop in job.spans():
        total: Tensor | None = None
        for tensor, weight in zip([job.base, *job.tensors], job.options["mixture"], strict=True):
            rows = job.rows(tensor, start, stop).float() * weight
            total = rows if total is None else total.add_(rows)
        assert total is not None
        yield start, total.to(job.dtype)


_ADAM = {"loss": "entropy", "init": 0.3, "lr": 1e-3, "batch": 16}

METHODS = (
    MergeMethod(
        "adamerging",
        mixture_rows,
        "needed",
        {},
        {"granularity": "layer", "density": 1.0, "steps": 500, **_ADAM},
        prepare=adamerging,
        data=True,
    ),
    MergeMethod(
        "fw_hard",
        mixture_rows,
        "needed",
        {},
        {
            **{"granularity": "task", "oracle": "inner", "start": "average", "steps": 10},
            **{"step_size": 1.0, "loss": "cross-entropy", "batch": 100},
        },
        prepare=fw_hard,
        data=True,
    ),
    MergeMethod(
        "fw_soft",
        mixture_rows,
        "needed",
        {},
        {
            **{"oracle": "inner", "start": "average", "steps": 3, "inner_steps": 500},
            **_ADAM,
        },
        prepare=fw_soft,
        data=True,
    ),
)
