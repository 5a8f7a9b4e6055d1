"""What learned merges share: a mixture, the text of its models, and coefficients by Adam.

Whatever is learned ends as weights of the base and the models, tensor by tensor. Shapes: M tensors,
V vertices (the base, then the models), N directions.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moekit.core.errors import UserError
from moekit.core.seeds import generator
from moekit.merge.job import Rows, TensorJob
from moekit.merge.mixture import LOSSES, Mixture
from moekit.merge.preparation import COEFFICIENTS_FILE, Preparation

GRANULARITIES = ("layer", "task")
ORACLES = ("inner", "cosine")
# Defaults of what is learned by Adam.
ADAM = {"loss": "entropy", "init": 0.3, "lr": 1e-3, "batch": 16}


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
        """The learner for all tensors of a method; `UserError` for slices and unknown options."""
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
        """Weights [M, V] that are one of the vertices."""
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
    keep(path, content)


def keep(path: Path, content: Mapping[str, Any]) -> None:
    """Write the state of a run, whole or not at all."""
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


def with_weights(
    jobs: Mapping[str, TensorJob], weights: Tensor, room: Preparation
) -> dict[str, TensorJob]:
    """The jobs as sums of the base and the models by weights [M, V], which also lie beside the
    result."""
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
