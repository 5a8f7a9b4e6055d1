"""Task vectors whose magnitudes compete over the whole model, as in the code of TIES (2306.01708).

Two passes over the models find each one's threshold from counts of bit patterns, exactly and in
constant memory; a third finds the sign that most entries of the model elected, which an entry gets
whose votes cancel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moekit.core.errors import UserError
from moekit.merge.consensus import Consensus, elected_balance
from moekit.merge.job import TensorJob
from moekit.merge.magnitude import Blocks, kept, magnitude_bits, nth_bits
from moekit.merge.sparsify import Everything, Rule
from moekit.merge.task_vectors import task_vector_blocks


@dataclass
class Above:
    """Keeps every entry whose magnitude has at least the bits `threshold`."""

    threshold: int
    density: float

    def masked(self, blocks: Blocks) -> Iterator[tuple[Tensor, Tensor, Tensor | float]]:
        for block in blocks():
            mask = torch.from_numpy(magnitude_bits(block) >= self.threshold).view(block.shape)
            yield block, mask, self.density


def compete(jobs: Mapping[str, TensorJob], vote: Consensus) -> dict[str, TensorJob]:
    """The jobs with what the whole model decides: thresholds, and the sign where votes cancel.

    Raises `UserError` where a model has several densities.
    """
    first = next(iter(jobs.values()))
    for job in jobs.values():
        if job.per_model["density"] != first.per_model["density"]:
            raise UserError(
                "the magnitudes of the whole model compete, so each model has one density; "
                f"{job.name} has another than {first.name}."
            )
    densities = [float(density) for density in first.per_model["density"]]
    weights = [float(weight) for weight in first.per_model["weight"]]
    every = list(jobs.values())
    rules = whole_model_rules(every, densities)
    found = {"thresholds": rules, "zero_sign": majority_sign(every, rules, weights, vote)}
    return {
        name: dataclasses.replace(job, options={**job.options, **found})
        for name, job in jobs.items()
    }


def whole_model_rules(jobs: Sequence[TensorJob], densities: Sequence[float]) -> list[Rule]:
    """For each model the rule that keeps its share of the largest entries of the whole model.

    With d entries of which the share p stays, the threshold is the (d - floor(d p))-th smallest
    magnitude, and what equals it stays too: floor(d p) + 1 entries and ties, as published.
    """
    return [
        Everything() if density >= 1 else Above(_threshold(jobs, model, density), density)
        for model, density in enumerate(densities)
    ]


def majority_sign(
    jobs: Sequence[TensorJob], rules: Sequence[Rule], weights: Sequence[float], vote: Consensus
) -> int:
    """The sign that more entries of the model elected, over those whose votes do not cancel."""
    balance = 0
    for job in jobs:
        streams = [rule.masked(_blocks(job, number)) for number, rule in enumerate(rules)]
        for parts in zip(*streams, strict=True):
            values = [
                kept(block, mask) * weight
                for (block, mask, _), weight in zip(parts, weights, strict=True)
            ]
            balance += elected_balance(values, vote)
    return 1 if balance >= 0 else -1


def _threshold(jobs: Sequence[TensorJob], model: int, density: float) -> int:
    entries = sum(int(torch.Size(job.shape).numel()) for job in jobs)
    place = max(entries - int(entries * density), 1)

    def blocks() -> Iterator[Tensor]:
        for job in jobs:
            yield from _blocks(job, model)()

    return nth_bits(blocks, place)[0]


def _blocks(job: TensorJob, model: int) -> Blocks:
    return task_vector_blocks(job.cast(job.base), job.tensors[model], job.block_rows)
