"""Searching the models' parameters layer by layer, for the least loss on text.

The homogeneous part of Unconstrained Model Merging (2410.13699), and what mergekit-evolve does: any
merge method, one value for each parameter, group of layers and model, by CMA-ES. Shapes: G groups
of layers (the tensors outside of them a group of their own), N models.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from moekit.core.errors import UserError
from moekit.merge.mixture import token_loss
from moekit.merge.preparation import Preparation
from moekit.merge.recipe import Search
from moekit.merge.sources import layer_of_name
from moekit.ops.cma_es import CmaEs

if TYPE_CHECKING:
    from moekit.merge.plan import MergedTensor

SEARCH_FILE = "moekit_search.json"


def searched(tensors: Mapping[str, MergedTensor], room: Preparation) -> dict[str, MergedTensor]:
    """`tensors` with the parameters that gave the least cross-entropy of all that were tried.

    `search.budget` merges are made in memory and run on the text of the models. The first is the
    recipe's own, so the result is never worse on that text. Goes on where an interrupted search
    stopped. Raises `UserError` for parameters that the methods do not have by model, and for
    methods that look at the whole model first.
    """
    search = room.recipe.search
    assert search is not None
    _check(tensors, search)
    groups = _groups(tensors, search.groups)
    first = [
        _mean(tensors, [n for n in groups if groups[n] == g], key, model)
        for key in search.over
        for g in range(max(groups.values()) + 1)
        for model in range(len(next(iter(tensors.values())).job.tensors))
    ]
    state = room.state("search")
    if state.exists():
        found = json.loads(state.read_text())
        cma = CmaEs.from_dict(found["cma"])
    else:
        low, high = search.low, search.high
        cma = CmaEs(torch.tensor(first), search.sigma, low, high, room.seed)
        found = {"tried": 0, "best": None, "losses": []}
    trial = _Trial(tensors, groups, search, room)
    while found["tried"] < search.budget:
        points = cma.ask()
        worth = torch.tensor([trial.loss(point.tolist()) for point in points])
        for point, loss in zip(points.tolist(), worth.tolist(), strict=True):
            if found["best"] is None or loss < found["best"]["loss"]:
                found["best"] = {"loss": loss, "values": point}
        found["tried"] += len(points)
        found["losses"].append(float(worth.min()))
        cma.tell(points, worth)
        state.write_text(json.dumps({**found, "cma": cma.to_dict()}))
        room.told(f"search, loss {found['best']['loss']:.4f}", found["tried"], search.budget)
    best = found["best"]["values"]
    room.files[SEARCH_FILE] = json.dumps(
        {
            "loss": found["best"]["loss"],
            "tried": found["tried"],
            "parameters": {n: trial.parameters(n, best) for n in tensors},
        },
        indent=1,
    )
    return trial.with_values(best)


class _Trial:
    """The network that merges are tried in, and the text they are tried on."""

    def __init__(
        self,
        tensors: Mapping[str, MergedTensor],
        groups: Mapping[str, int],
        search: Search,
        room: Preparation,
    ) -> None:
        self._tensors, self._groups, self._search = tensors, groups, search
        self._network = room.model(room.recipe.reference)
        places = self._network.state_dict(keep_vars=True)
        missing = next((name for name in tensors if name not in places), None)
        if missing is not None:
            raise UserError(f"search runs the merged model, which has no {missing}.")
        self._places = places
        models = dict.fromkeys(m for t in tensors.values() for m, _ in t.job.origins)
        self._text = [ids for model in models for ids in room.sequences(model)]

    def parameters(self, name: str, values: list[float]) -> dict[str, list[float]]:
        """The searched parameters of one tensor, a value for each model."""
        count = len(self._tensors[name].job.tensors)
        groups = max(self._groups.values()) + 1
        place = self._groups[name]
        return {
            key: values[(number * groups + place) * count :][:count]
            for number, key in enumerate(self._search.over)
        }

    def with_values(self, values: list[float]) -> dict[str, MergedTensor]:
        made = {}
        for name, tensor in self._tensors.items():
            given = {**tensor.job.per_model, **self.parameters(name, values)}
            job = dataclasses.replace(tensor.job, per_model=given)
            made[name] = dataclasses.replace(tensor, job=job)
        return made

    def loss(self, values: list[float]) -> float:
        """Mean cross-entropy of the merge with these values over all sequences, nats a token."""
        with torch.no_grad():
            for name, tensor in self.with_values(values).items():
                rows = [block for _, block in tensor.pieces()]
                whole = torch.cat(rows) if tensor.shape else rows[0]
                self._places[name].copy_(whole)
            losses = [
                float(token_loss(self._network, ids, "cross-entropy")) * (ids.shape[1] - 1)
                for ids in self._text
            ]
        return sum(losses) / sum(ids.shape[1] - 1 for ids in self._text)


def _groups(tensors: Mapping[str, MergedTensor], count: int) -> dict[str, int]:
    """For every tensor its group: layers by depth in `count` groups, then all other tensors."""
    layers = {name: (layer_of_name(name) or ("", None, ""))[1] for name in tensors}
    numbers = sorted({layer for layer in layers.values() if layer is not None})
    count = min(count, len(numbers))
    place = {layer: i * count // len(numbers) for i, layer in enumerate(numbers)}
    return {name: count if layer is None else place[layer] for name, layer in layers.items()}


def _mean(tensors: Mapping[str, MergedTensor], names: list[str], key: str, model: int) -> float:
    values: list[Any] = [tensors[name].job.per_model[key][model] for name in names]
    return sum(map(float, values)) / len(values) if values else 0.0


def _check(tensors: Mapping[str, MergedTensor], search: Search) -> None:
    counts = {len(tensor.job.tensors) for tensor in tensors.values()}
    if len(counts) > 1:
        raise UserError(f"search needs the same models for all tensors, not {sorted(counts)}.")
    for tensor in tensors.values():
        name = tensor.method.name
        if tensor.method.prepare is not None:
            raise UserError(f"search cannot try {name}, which looks at the whole model first.")
        for key in search.over:
            if key not in tensor.method.per_model:
                has = ", ".join(tensor.method.per_model) or "none"
                raise UserError(f"search over {key}: {name} has by model {has}.")
