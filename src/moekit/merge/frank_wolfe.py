"""FW-Merging: towards the models that gradients on text point to (2503.12649), hard and soft.

Shapes: M tensors, V vertices (the base, then the models).
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from torch import Tensor

from moekit.merge.job import MergeMethod, TensorJob
from moekit.merge.learner import ADAM, Learner, keep, mixture_rows, with_weights
from moekit.merge.preparation import Preparation


def fw_hard(jobs: Mapping[str, TensorJob], room: Preparation) -> dict[str, TensorJob]:
    """The weights that `frank_wolfe` finds from text."""
    return with_weights(jobs, frank_wolfe(Learner.of(jobs, room)), room)


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
        keep(state, {"done": step + 1, "weights": weights.tolist()})
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
    return with_weights(jobs, weights, room)


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


METHODS = (
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
            **ADAM,
        },
        prepare=fw_soft,
        data=True,
    ),
)
