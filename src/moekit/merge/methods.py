"""The merge methods by name: presets of the task-vector kernel, and those with an own formula.

`dialect` tells the two forms apart of a method whose paper and mergekit implementation differ.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from moekit.core.errors import UserError
from moekit.merge import competition, spherical, subspace
from moekit.merge.adamerging import METHODS as ADAMERGING
from moekit.merge.consensus import Consensus
from moekit.merge.frank_wolfe import METHODS as FRANK_WOLFE
from moekit.merge.job import REQUIRED, ByTensor, MergeMethod, Prepare, Rows, TensorJob
from moekit.merge.pleas import METHOD as PLEAS
from moekit.merge.sparsify import Density
from moekit.merge.statistics import METHODS as STATISTICS
from moekit.merge.task_vectors import Part, Settings, merge_rows
from moekit.merge.whole_model import compete

_MASS = Consensus("mass")
_MEAN = Consensus("mass", mean=True)

# Parameters of each model that say how much of its task vector stays.
SHARES = ("density", "epsilon", "gamma")

# name -> (in mergekit's dialect, in the paper's)
TASK_VECTORS: dict[str, tuple[Settings, Settings]] = {
    "task_arithmetic": (Settings(), Settings()),
    "ties": (
        Settings("magnitude", consensus=_MASS, normalize=True),
        Settings("magnitude", consensus=_MEAN, density=Density(0.2), whole_model=True),
    ),
    "dare_linear": (Settings("random", "l1"), Settings("random", "inverse")),
    "dare_ties": (
        Settings("random", "l1", consensus=_MASS),
        Settings("random", "inverse", consensus=_MEAN),
    ),
    "della_linear": (Settings("magprune", "l1"), Settings("magprune", "inverse")),
    "della": (
        Settings("magprune", "l1", consensus=_MASS, normalize=True),
        Settings("magprune", "inverse", consensus=_MASS, normalize=True),
    ),
    "breadcrumbs": (Settings("band"), Settings("band")),
    "breadcrumbs_ties": (Settings("band", consensus=_MASS), Settings("band", consensus=_MASS)),
}


def _task_vectors(settings: Settings) -> Callable[[TensorJob], Rows]:
    def run(job: TensorJob) -> Rows:
        options = job.options
        used = dataclasses.replace(
            settings,
            normalize=bool(options["normalize"]),
            scale=float(options["lambda"]),
            rescale=_rescale(settings.rescale, options.get("rescale", False)),
        )
        count = len(job.tensors)
        columns = {key: job.per_model.get(key, [None] * count) for key in SHARES}
        parts = [
            Part(job.tensors[i], float(job.per_model["weight"][i]), _density(columns, i))
            for i in range(count)
        ]
        return merge_rows(
            used,
            job.cast(job.base),
            parts,
            generator=job.generator,
            block_rows=job.block_rows,
            zero_sign=int(options.get("zero_sign", 1)),
            thresholds=options.get("thresholds"),
        )

    return run


def _rescale(default: str, wanted: bool) -> str:
    """How what stays is scaled: by the method's own rule, or by mergekit's where it has none."""
    if not wanted:
        return "none"
    return default if default != "none" else "l1"


def _density(columns: Mapping[str, list[Any]], place: int) -> Density:
    given = {
        key: float(values[place]) for key, values in columns.items() if values[place] is not None
    }
    return Density(**given)


def _linear(job: TensorJob) -> Rows:
    weights = torch.tensor([float(weight) for weight in job.per_model["weight"]])
    total = weights.sum()
    if job.options["normalize"] and abs(float(total)) < 1e-12:
        raise UserError(f"linear: the weights {job.per_model['weight']} add up to 0.")
    for start, stop in job.spans():
        mixed: Tensor | None = None
        for tensor, weight in zip(job.tensors, weights, strict=True):
            rows = job.rows(tensor, start, stop).float()
            mixed = rows * weight if mixed is None else mixed.addcmul_(rows, weight)
        assert mixed is not None
        mixed = mixed.div_(total) if job.options["normalize"] else mixed
        yield start, mixed.to(job.dtype)


def _passthrough(job: TensorJob) -> Rows:
    scale = job.per_model["scale"][0]
    for start, stop in job.spans():
        rows = job.rows(job.tensors[0], start, stop)
        yield start, rows if scale is None else rows * float(scale)


def _nearswap(job: TensorJob) -> Rows:
    for start, stop in job.spans():
        base, other = (job.rows(tensor, start, stop) for tensor in (job.base, job.tensors[0]))
        yield start, spherical.nearswap(base, other, float(job.options["t"]))


def _slerp(job: TensorJob) -> Tensor:
    return spherical.slerp(job.whole(job.base), job.whole(job.tensors[0]), float(job.options["t"]))


def _nuslerp(job: TensorJob) -> Tensor:
    base = None if job.base is None else job.whole(job.base)
    first, second = job.all_whole()
    return spherical.nuslerp(
        first,
        second,
        [float(weight) for weight in job.per_model["weight"]],
        base,
        row_wise=bool(job.options["nuslerp_row_wise"]),
        flatten=bool(job.options["nuslerp_flatten"]),
    )


def _multislerp(job: TensorJob) -> Tensor:
    return spherical.multislerp(
        job.all_whole(),
        [float(weight) for weight in job.per_model["weight"]],
        None if job.base is None else job.whole(job.base),
        normalize=bool(job.options["normalize_weights"]),
        eps=float(job.options["eps"]),
    )


def _karcher(job: TensorJob) -> Tensor:
    options = job.options
    return spherical.karcher(
        job.all_whole(), max_iter=int(options["max_iter"]), tol=float(options["tol"])
    )


def _model_stock(job: TensorJob) -> Tensor:
    return spherical.model_stock(
        job.whole(job.base),
        job.all_whole(),
        filter_wise=bool(job.options["filter_wise"]),
        clamp=bool(job.options["clamp"]),
    )


def _arcee_fusion(job: TensorJob) -> Tensor:
    return spherical.arcee_fusion(job.whole(job.base), job.whole(job.tensors[0]))


def _sce(job: TensorJob) -> Tensor:
    erase = str(job.options["select_applies_to"])
    mixed = competition.sce(job.deltas(), float(job.options["select_topk"]), erase_from=erase)
    return job.whole(job.base) + mixed


def _varm(job: TensorJob) -> Tensor:
    deltas = job.deltas()
    share = competition.square_shares(deltas).view(-1, *[1] * (deltas.ndim - 1))
    return job.whole(job.base) + float(job.options["lambda"]) * (share * deltas).sum(0)


def _pcb(job: TensorJob) -> Tensor:
    options = job.options
    deltas = job.deltas().float()
    flat = deltas.flatten(1)
    mixed = competition.pcb(
        flat,
        float(options["density"]),
        float(options["lambda"]),
        clip=float(options["clip"]),
        inter=str(options["inter"]),
    )
    return job.whole(job.base) + mixed.view(deltas.shape[1:]).to(job.dtype)


def _widen(job: TensorJob) -> Tensor:
    return competition.widen(
        job.whole(job.base),
        torch.stack(job.all_whole()),
        ratio=float(job.options["ratio"]),
        calibration=float(job.options["calibration"]),
        by_row="embed" in job.name,
    )


def _ram(job: TensorJob) -> Tensor:
    options = job.options
    mixed = competition.ram(
        job.deltas(),
        gain=float(options.get("r", 0)),
        limit=float(options.get("alpha", 0)),
        active=float(options["epsilon"]),
    )
    return job.whole(job.base) + mixed


def _matrices(merge: Callable[[Tensor, TensorJob], Tensor]) -> Callable[[TensorJob], Tensor]:
    """A method for matrices: banks of experts one by one, vectors and scalars by their mean."""

    def run(job: TensorJob) -> Tensor:
        deltas, base = job.deltas().float(), job.whole(job.base)
        if base.ndim < 2:
            mixed = deltas.mean(0)
        else:
            flat = deltas.reshape(len(deltas), -1, *base.shape[-2:])
            mixed = torch.stack([merge(flat[:, i], job) for i in range(flat.shape[1])])
        scale = float(job.options["lambda"])
        return base + (scale * mixed).view(base.shape).to(job.dtype)

    return run


def _r_tsvm(deltas: Tensor, job: TensorJob) -> Tensor:
    return subspace.tsv_merge(
        deltas, weights=subspace.outlier_weights(deltas), ranks=subspace.sparsity_ranks(deltas)
    )


def _knots(deltas: Tensor, job: TensorJob) -> Tensor:
    settings = TASK_VECTORS["ties"][0]
    weights = [float(weight) for weight in job.per_model["weight"]]

    def ties(coordinates: Tensor) -> Tensor:
        parts = [
            Part(one, weight, Density(float(density)))
            for one, weight, density in zip(
                coordinates, weights, job.per_model["density"], strict=True
            )
        ]
        rows = merge_rows(
            dataclasses.replace(settings, normalize=False),
            torch.zeros_like(coordinates[0]),
            parts,
            generator=job.generator,
            block_rows=coordinates.shape[1],
        )
        return torch.cat([block for _, block in rows])

    return subspace.knots(deltas, ties)


_WEIGHT = {"weight": REQUIRED}
_LAMBDA = {"lambda": 1.0}

OTHERS = (
    MergeMethod("linear", _linear, "none", _WEIGHT, {"normalize": True}),
    MergeMethod("passthrough", _passthrough, "none", {"scale": None}, {}, (1, 1)),
    MergeMethod("slerp", ByTensor(_slerp), "first", {}, {"t": REQUIRED}, (1, 1)),
    MergeMethod(
        "nuslerp",
        ByTensor(_nuslerp),
        "optional",
        _WEIGHT,
        {"nuslerp_row_wise": False, "nuslerp_flatten": True},
        (2, 2),
    ),
    MergeMethod(
        "multislerp",
        ByTensor(_multislerp),
        "optional",
        _WEIGHT,
        {"normalize_weights": True, "eps": 1e-8},
        (2, None),
    ),
    MergeMethod(
        "karcher", ByTensor(_karcher), "none", {}, {"max_iter": 10, "tol": 1e-5}, (2, None)
    ),
    MergeMethod(
        "model_stock",
        ByTensor(_model_stock),
        "needed",
        {},
        {"filter_wise": False, "clamp": True},
        (2, None),
    ),
    MergeMethod("nearswap", _nearswap, "first", {}, {"t": REQUIRED}, (1, 1)),
    MergeMethod("arcee_fusion", ByTensor(_arcee_fusion), "first", {}, {}, (1, 1)),
    MergeMethod(
        "sce",
        ByTensor(_sce),
        "needed",
        {},
        {"select_topk": 1.0, "select_applies_to": "deltas", "int8_mask": False},
    ),
    MergeMethod("varm", ByTensor(_varm), "needed", {}, _LAMBDA),
    MergeMethod(
        "pcb",
        ByTensor(_pcb),
        "needed",
        {},
        {"density": 0.1, "lambda": 1.2, "clip": 1e-4, "inter": "normalised"},
    ),
    MergeMethod("widen", ByTensor(_widen), "needed", {}, {"ratio": 1.0, "calibration": 1.0}),
    MergeMethod("ram", ByTensor(_ram), "needed", {}, {"epsilon": 1e-5}),
    MergeMethod(
        "ramplus_tl", ByTensor(_ram), "needed", {}, {"r": 0.1, "alpha": 0.2, "epsilon": 1e-5}
    ),
    MergeMethod(
        "tsv_m", ByTensor(_matrices(lambda d, _: subspace.tsv_merge(d))), "needed", {}, _LAMBDA
    ),
    MergeMethod("r_tsvm", ByTensor(_matrices(_r_tsvm)), "needed", {}, _LAMBDA),
    MergeMethod(
        "iso_c", ByTensor(_matrices(lambda d, _: subspace.isotropic(d))), "needed", {}, _LAMBDA
    ),
    MergeMethod(
        "iso_cts",
        ByTensor(_matrices(lambda d, j: subspace.isotropic(d, common=float(j.options["common"])))),
        "needed",
        {},
        {**_LAMBDA, "common": 0.8},
    ),
    MergeMethod(
        "knots",
        ByTensor(_matrices(_knots)),
        "needed",
        {"weight": 1.0, "density": 0.2},
        _LAMBDA,
    ),
)


NAMED = (*OTHERS, *STATISTICS, *ADAMERGING, *FRANK_WOLFE, PLEAS)
ALL = (*TASK_VECTORS, *(method.name for method in NAMED))


def merge_method(*, name: str, dialect: str = "mergekit") -> MergeMethod:
    """The method called `name` in one dialect ("mergekit" or "paper")."""
    if name in TASK_VECTORS:
        return _preset(name, dialect)
    method = next(method for method in NAMED if method.name == name)
    if name == "model_stock" and dialect == "mergekit":
        return dataclasses.replace(method, options={**method.options, "clamp": False})
    return method


def _preset(name: str, dialect: str) -> MergeMethod:
    settings = TASK_VECTORS[name][dialect == "paper"]
    per_model: dict[str, Any] = {"weight": REQUIRED if dialect == "mergekit" else 1.0}
    options: dict[str, Any] = {"normalize": settings.normalize, "lambda": settings.scale}
    if settings.sparsifier is not None:
        per_model["density"] = settings.density.density
        options["rescale"] = settings.rescale != "none"
    if settings.sparsifier == "band":
        per_model["gamma"] = settings.density.gamma
    if settings.sparsifier == "magprune":
        per_model["epsilon"] = settings.density.epsilon
    # Only changes the type of a mask in mergekit.
    options["int8_mask"] = False
    prepare: Prepare | None = None
    if settings.whole_model:
        vote = settings.consensus or Consensus()

        def prepare(jobs: Mapping[str, TensorJob], room: Any) -> Mapping[str, TensorJob]:
            return compete(jobs, vote)

    run = _task_vectors(settings)
    return MergeMethod(name, run, "needed", per_model, options, settings=settings, prepare=prepare)
