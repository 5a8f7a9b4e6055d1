"""`TaskLibrary`: which experts each of several tasks needs, and which task a query is like.

PreMoe (2505.17639): the key of a task is what the router of the first MoE layer says on its text,
its value the order of every layer's experts. A query runs up to that layer only; the task with the
nearest key gives the experts to keep, as a plan, or as a mask on the running model. The paper
stores an order as a permutation of the first layer's; the orders themselves say the same.

Shapes: L MoE layers, E experts, C choices of the first MoE layer.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moekit.compress.prune.saliency import score
from moekit.compress.prune.select import Room
from moekit.core.collect import Batch, collect
from moekit.core.errors import UserError
from moekit.core.plan import Fingerprint
from moekit.core.spec import MoESpec
from moekit.core.stats import ExpertStats
from moekit.core.view import MoEView
from moekit.profile.pass_ import ProfileSink
from moekit.profile.routing_sums import RoutingSums

FORMAT = "moekit.task-library"
VERSION = 1
# What a token's kept logits are: its top-k, or its largest as in the published code.
KEY_STATISTICS = {False: "kept_logit_sum", True: "top_logit_sum"}


@dataclass(frozen=True)
class Task:
    """The key [C] of one task, and per MoE layer its experts in order, the best first."""

    key: list[float]
    orders: list[list[int]]


@dataclass(frozen=True)
class TaskLibrary:
    """Tasks by name, for one model.

    `score` names the saliency that ordered the experts; `top1` and `kept_share` say how keys are
    taken (see `saliency.tcess`), which a query repeats.
    """

    model: Fingerprint
    tasks: dict[str, Task]
    score: str = "tcess"
    top1: bool = False
    kept_share: float = 0.0

    @classmethod
    def of(cls, stats: ExpertStats, method: str = "tcess", *, top1: bool = False) -> TaskLibrary:
        """One task for each domain of `stats`, its experts in the order of the saliency `method`.

        Raises UserError where the stats lack what the method or the key needs.
        """
        options = {"top1": top1} if method == "tcess" else {}
        tasks = {}
        for domain in stats.domains:
            scores = score(stats, method, domain=domain, **options)
            orders = [layer.sort(descending=True, stable=True).indices.tolist() for layer in scores]
            key = stats.by_domain(0, KEY_STATISTICS[top1], domain) / stats.num_tokens(0, domain)
            tasks[domain] = Task(key.tolist(), orders)
        layers = stats.layers
        model = Fingerprint(
            stats.model_type,
            tuple(layer.index for layer in layers),
            tuple(layer.num_experts for layer in layers),
            tuple(layer.top_k for layer in layers),
        )
        kept_share = float(stats.settings.get("kept_share", 0.0))
        return cls(model, tasks, method, top1, kept_share)

    def check(self, spec: MoESpec) -> None:
        """Raise UserError unless the library is of a model with this spec."""
        other = Fingerprint.of(spec)
        if other != self.model:
            raise UserError(
                f"the library is for {self.model.describe()}; this model is {other.describe()}."
            )

    def key_of(self, view: MoEView, batches: Sequence[Batch | Tensor]) -> Tensor:
        """The key [C] of a text: runs the model up to its first MoE layer."""
        sink = ProfileSink([RoutingSums(kept_share=self.kept_share)], [0])
        with sink.attached(view, stop_after=0):
            collect(view, batches, [sink], logits=True)
        total = sink.sums.held[0, KEY_STATISTICS[self.top1]].sum(0)
        return total / sink.sums.held[0, "tokens"].sum()

    def nearest(self, key: Tensor) -> list[tuple[str, float]]:
        """Names and Euclidean distances of the tasks, the nearest first; key [C]."""
        distances = {
            name: float(torch.dist(key.double().cpu(), torch.tensor(task.key, dtype=torch.float64)))
            for name, task in self.tasks.items()
        }
        return sorted(distances.items(), key=lambda item: item[1])

    def keep(self, task: str, rooms: Sequence[Room]) -> list[list[int]]:
        """The experts that a task keeps in every layer, as many as `rooms` have."""
        kept = []
        for room, order in zip(rooms, self._task(task).orders, strict=True):
            rank = torch.empty(len(order))
            rank[torch.tensor(order)] = torch.arange(len(order), 0.0, -1.0)
            kept.append(room.best(rank))
        return kept

    @contextmanager
    def serving(self, view: MoEView, task: str, rooms: Sequence[Room]) -> Iterator[None]:
        """Run the model inside with the task's experts only; the router chooses among them."""
        kept = self.keep(task, rooms)
        gone = {p: room.gone(kept[p]) for p, room in enumerate(rooms)}
        with view.ban_experts(gone):
            yield

    def _task(self, name: str) -> Task:
        if name not in self.tasks:
            raise UserError(f"the library has no task {name!r}; it has {', '.join(self.tasks)}.")
        return self.tasks[name]

    # -- files --

    def save(self, path: str | Path) -> None:
        """Write the library as JSON."""
        data = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}
        Path(path).write_text(json.dumps(data) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> TaskLibrary:
        """Read a library; raises UserError for what is none, or is damaged."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            known = (data.pop("format"), data.pop("version"))
        except OSError as error:
            raise UserError(f"the library {path} cannot be read: {error.strerror}.") from error
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{path} is no task library.") from error
        if known != (FORMAT, VERSION):
            raise UserError(f"{path} is {known[0]} version {known[1]}, not {FORMAT} {VERSION}.")
        try:
            return cls(**{**data, "model": _model(data["model"]), "tasks": _tasks(data)})
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"the library {path} is damaged: {error}.") from error


def _model(data: dict[str, Any]) -> Fingerprint:
    layers, experts, top_k = (tuple(data[name]) for name in ("layers", "num_experts", "top_k"))
    return Fingerprint(data["model_type"], layers, experts, top_k)


def _tasks(data: dict[str, Any]) -> dict[str, Task]:
    counts = data["model"]["num_experts"]
    tasks = {name: Task(**task) for name, task in data["tasks"].items()}
    for name, task in tasks.items():
        if [sorted(order) for order in task.orders] != [list(range(count)) for count in counts]:
            raise ValueError(f"the orders of task {name!r} are not those of {counts} experts")
        if len(task.key) < counts[0]:
            raise ValueError(f"the key of task {name!r} has {len(task.key)} numbers")
    return tasks
