"""Merging by what each model's own text says of its weights: Fisher, RegMean, AIM, sensitivity.

Each method declares a statistic, which is measured once for every model (or for the base) and read
tensor by tensor. Shapes: O outputs, D inputs of a matrix.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from moekit.core.deferred import Deferred
from moekit.merge.job import ByTensor, MergeMethod, Rows, TensorJob
from moekit.merge.preparation import COEFFICIENTS_FILE, Preparation
from moekit.merge.sources import layer_of_name
from moekit.merge.task_vectors import read_rows
from moekit.ops.regression import regression_mean
from moekit.profile.fisher import fisher_diagonal
from moekit.profile.parameter_inputs import parameter_inputs

NORM = "norm"
# A statistic of a matrix whose inputs are its rows.
TRANSPOSED = "transposed "


def measured(
    statistic: str, of_base: bool = False
) -> Callable[[Mapping[str, TensorJob], Preparation], dict[str, TensorJob]]:
    """A `prepare` that gives every job the statistic of its tensors, or of the base's."""

    def prepare(jobs: Mapping[str, TensorJob], room: Preparation) -> dict[str, TensorJob]:
        found: dict[str, Mapping[str, Deferred]] = {}

        def one(model: str, name: str) -> Any:
            if model not in found:
                key = hashlib.sha256(model.encode()).hexdigest()[:12]
                found[model] = room.kept(
                    f"{statistic}-{key}", lambda: _MEASURES[statistic](room, model)
                )
            held = found[model]
            return held.get(name, held.get(TRANSPOSED + name))

        made = {}
        for key, job in jobs.items():
            wanted: Sequence[Any] = [job.base_origin] if of_base else job.origins
            values = [one(*origin) for origin in wanted]
            norms = [_norm(found[origin[0]]) for origin in wanted]
            turned = any(TRANSPOSED + name in found[model] for model, name in wanted)
            options = {**job.options, "norms": norms, "transposed": turned}
            made[key] = dataclasses.replace(job, statistics=values, options=options)
        return made

    return prepare


def _norm(held: Mapping[str, Deferred]) -> float:
    return float(held[NORM].read()) if NORM in held else 1.0


def _fisher(room: Preparation, model: str) -> dict[str, Tensor]:
    network = room.model(model)
    named = dict(network.named_parameters(remove_duplicate=False))
    parameters = list(dict.fromkeys(p for p in named.values() if p.is_floating_point()))
    text = _counted(room, model, "Fisher")
    squares, count = fisher_diagonal(network, text, parameters, room.seed)
    made = {name: squares[p] / count for name, p in named.items() if p in squares}
    total = sum(float(value.double().square().sum()) for value in squares.values())
    return {**made, NORM: torch.tensor(total**0.5 / count)}


def _inputs(kind: str) -> Callable[[Preparation, str], dict[str, Tensor]]:
    def measure(room: Preparation, model: str) -> dict[str, Tensor]:
        found = parameter_inputs(room.model(model), room.sequences(model), kind)
        room.told(f"inputs of {model}", 1, 1)
        prefix = {-1: "", -2: TRANSPOSED}
        return {prefix[found.axis[name]] + name: value for name, value in found.values.items()}

    return measure


def _sensitivity(room: Preparation, model: str) -> dict[str, Tensor]:
    """|weight * gradient of the loss|, summed over a tensor: how much zeroing it would change."""
    network = room.model(model)
    named = dict(network.named_parameters(remove_duplicate=False))
    totals = dict.fromkeys(named, 0.0)
    for ids in _counted(room, model, "sensitivity"):
        network.zero_grad()
        logits = network(input_ids=ids, use_cache=False).logits[0, :-1].float()
        functional.cross_entropy(logits, ids[0, 1:]).backward()
        for name, parameter in named.items():
            if parameter.grad is not None:
                totals[name] += float((parameter.detach() * parameter.grad).abs().sum())
    return {name: torch.tensor(total) for name, total in totals.items()}


def _counted(room: Preparation, model: str, what: str) -> Any:
    sequences = room.sequences(model)
    for number, ids in enumerate(sequences):
        yield ids
        room.told(f"{what} of {model}", number + 1, len(sequences))


_MEASURES: dict[str, Callable[[Preparation, str], dict[str, Tensor]]] = {
    "fisher": _fisher,
    "second": _inputs("second"),
    "absolute": _inputs("absolute"),
    "sensitivity": _sensitivity,
}


def fisher_rows(job: TensorJob) -> Rows:
    """Sum of weight * F * W over the sum of weight * F, entry by entry (2111.09832).

    F of the first model, or with `floor_all` of every, is at least `floor`. Entries that nothing
    is known of get the mean.
    """
    norms = job.options["norms"] if job.options["norm"] else [1.0] * len(job.tensors)
    for start, stop in job.spans():
        top = bottom = plain = torch.zeros(())
        for number, tensor in enumerate(job.tensors):
            rows = job.rows(tensor, start, stop).float()
            plain = plain + rows / len(job.tensors)
            held = job.statistics[number]
            if held is None:
                continue
            share = read_rows(held, start, stop)
            if number == 0 or job.options["floor_all"]:
                share = share.clamp(min=float(job.options["floor"]))
            share = share * (float(job.per_model["weight"][number]) / max(norms[number], 1e-30))
            top, bottom = top + share * rows, bottom + share
        known = bottom > 0
        merged = torch.where(known, top / torch.where(known, bottom, 1.0), plain)
        yield start, merged.to(job.dtype)


def regmean(job: TensorJob) -> Tensor:
    """RegMean of a matrix or of every expert of a bank; of other tensors the weighted mean.

    `scale` multiplies the moments' entries off the diagonal.
    """
    weights = [float(weight) for weight in job.per_model["weight"]]
    tensors = [tensor.float() for tensor in job.all_whole()]
    centre = sum(w * t for w, t in zip(weights, tensors, strict=True)) / sum(weights)
    assert isinstance(centre, Tensor)
    if any(one is None for one in job.statistics):
        return centre.to(job.dtype)
    moments = [_shrunk(one.read(), float(job.options["scale"])) for one in job.statistics]
    turn = bool(job.options["transposed"])
    banks = [_stacked(one, turn) for one in (centre, *tensors)]
    stacks = [moment.view(-1, *moment.shape[-2:]) for moment in moments]
    made = [
        regression_mean(
            [bank[e] for bank in banks[1:]],
            [stack[e] for stack in stacks],
            weights,
            banks[0][e],
            float(job.options["ridge"]),
        )
        for e in range(len(banks[0]))
    ]
    merged = torch.stack(made)
    return (merged.mT if turn else merged).reshape(job.shape).to(job.dtype)


def _stacked(tensor: Tensor, turn: bool) -> Tensor:
    """Matrices [E, O, D]."""
    stack = tensor.reshape(-1, *tensor.shape[-2:])
    return stack.mT if turn else stack


def _shrunk(moment: Tensor, scale: float) -> Tensor:
    diagonal = torch.diag_embed(moment.diagonal(dim1=-2, dim2=-1))
    return scale * moment + (1 - scale) * diagonal


def aim(job: TensorJob) -> Tensor:
    """A merge moved back towards its base where the base's inputs are large (AIM 2502.02421).

    The change of each input column is multiplied with 1 - s (1 - omega), s its mean absolute input
    over the largest. What reads no measured input stays merged.
    """
    merged, base = job.whole(job.tensors[0]), job.whole(job.base)
    held = job.statistics[0]
    if held is None:
        return merged
    size = held.read()
    share = size / size.amax(-1, keepdim=True).clamp(min=1e-30)
    factor = 1 - share * (1 - float(job.options["omega"]))
    factor = factor.unsqueeze(-1 if job.options["transposed"] else -2)
    return (base.float() + (merged - base).float() * factor).to(job.dtype)


def sensitive_weights(jobs: Mapping[str, TensorJob], room: Preparation) -> dict[str, TensorJob]:
    """Weights by layer from the models' sensitivities (Sens-Merging 2502.12420, data-driven part).

    A model's sensitivity to a layer is the sum of |weight * gradient| over it as a share of the
    model's norm over layers; a softmax of these over the models, at `temperature`, times the number
    of models, multiplies the weights.
    """
    jobs = measured("sensitivity")(jobs, room)
    first = next(iter(jobs.values()))
    layers = {key: (layer_of_name(key) or ("", -1, ""))[1] for key in jobs}
    totals = {layer: [0.0] * len(first.tensors) for layer in layers.values()}
    for key, job in jobs.items():
        for number, value in enumerate(job.statistics):
            totals[layers[key]][number] += 0.0 if value is None else float(value.read())
    table = torch.tensor(list(totals.values()), dtype=torch.float64)
    table = table / table.norm(dim=0).clamp(min=1e-30)
    temperature = float(first.options["temperature"])
    factors = table.div(temperature).softmax(dim=1) * table.shape[1]
    found = dict(zip(totals, factors.tolist(), strict=True))
    room.files[COEFFICIENTS_FILE] = json.dumps(
        {"layers": {str(layer): values for layer, values in found.items()}}, indent=2
    )
    made = {}
    for key, job in jobs.items():
        weights = [
            float(weight) * factor
            for weight, factor in zip(job.per_model["weight"], found[layers[key]], strict=True)
        ]
        made[key] = dataclasses.replace(job, per_model={**job.per_model, "weight": weights})
    return made


def sum_rows(job: TensorJob) -> Rows:
    """The base and the weighted sum of the task vectors."""
    for start, stop in job.spans():
        base = job.rows(job.base, start, stop).float()
        total = base.clone()
        for tensor, weight in zip(job.tensors, job.per_model["weight"], strict=True):
            total += float(weight) * (job.rows(tensor, start, stop).float() - base)
        yield start, total.to(job.dtype)


METHODS = (
    MergeMethod(
        "fisher",
        fisher_rows,
        "none",
        {"weight": 1.0},
        {"norm": True, "floor": 1e-6, "floor_all": False},
        prepare=measured("fisher"),
        data=True,
    ),
    MergeMethod(
        "regmean",
        ByTensor(regmean),
        "none",
        {"weight": 1.0},
        {"scale": 0.9, "ridge": 1e-4},
        prepare=measured("second"),
        data=True,
    ),
    MergeMethod(
        "aim",
        ByTensor(aim),
        "needed",
        {},
        {"omega": 0.4},
        (1, 1),
        prepare=measured("absolute", of_base=True),
        data=True,
    ),
    MergeMethod(
        "sens",
        sum_rows,
        "needed",
        {"weight": 0.7},
        {"temperature": 2.0},
        prepare=sensitive_weights,
        data=True,
    ),
)
