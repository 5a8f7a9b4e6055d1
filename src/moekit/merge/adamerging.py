"""AdaMerging: coefficients of task vectors by gradients of a loss on text (2310.02575)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from moekit.merge.consensus import Consensus
from moekit.merge.job import MergeMethod, TensorJob
from moekit.merge.learner import ADAM, Learner, mixture_rows, with_weights
from moekit.merge.magnitude import kept
from moekit.merge.preparation import Preparation
from moekit.merge.task_vectors import task_vector_blocks
from moekit.merge.whole_model import whole_model_rules


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
    return with_weights(jobs, found, room)


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


METHODS = (
    MergeMethod(
        "adamerging",
        mixture_rows,
        "needed",
        {},
        {"granularity": "layer", "density": 1.0, "steps": 500, **ADAM},
        prepare=adamerging,
        data=True,
    ),
)
