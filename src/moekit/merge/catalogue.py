"""The merge methods in the registry: title, paper, and what to know before taking one."""

from __future__ import annotations

from typing import Any

from moekit.core.registry import Option, register_preset, registry
from moekit.merge.job import REQUIRED, MergeMethod
from moekit.merge.methods import ALL, merge_method

_BASE = "Needs a base_model."
_TEXT = "Needs text (--data)."
_TIES, _DARE, _DELLA = "TIES 2306.01708", "DARE 2311.03099", "DELLA 2406.11617"
_CRUMBS, _TSV, _ISO = "Model breadcrumbs 2312.06795", "TSV-M 2412.00081", "Iso-C 2502.04959"
_RESCALED = f"{_BASE} In mergekit's dialect the sum of magnitudes is kept, not the expectation."

# Beside weights.
NEEDS = {
    **dict.fromkeys(("regmean", "aim", "pleas"), ("data",)),
    **dict.fromkeys(("fisher", "sens", "adamerging", "fw_hard", "fw_soft"), ("data", "gradients")),
}

# name -> (title, paper, limits)
_ROWS: dict[str, tuple[str, str, str]] = {
    "linear": ("Weighted average", "Model soups 2203.05482", ""),
    "task_arithmetic": ("Weighted sum of the task vectors", "Task arithmetic 2212.04089", _BASE),
    "ties": (
        "Largest changes, signs elected by mass, those that agree averaged",
        _TIES,
        f"{_BASE} Magnitudes compete in a tensor (mergekit) or over the model (paper).",
    ),
    "dare_linear": ("Changes dropped at random, the rest rescaled and added", _DARE, _RESCALED),
    "dare_ties": ("Changes dropped at random, signs elected", _DARE, _RESCALED),
    "della": ("Changes dropped by rank in their row, signs elected", _DELLA, _RESCALED),
    "della_linear": ("Changes dropped by rank in their row, the rest added", _DELLA, _RESCALED),
    "breadcrumbs": ("Neither the largest nor the smallest changes, added", _CRUMBS, _BASE),
    "breadcrumbs_ties": (
        "Neither the largest nor the smallest changes, signs elected",
        _CRUMBS,
        _BASE,
    ),
    "passthrough": ("One model's tensors as they are, or scaled", "", "One model a slice."),
    "slerp": (
        "Along the great circle from one model to another",
        "",
        "The base_model and one other.",
    ),
    "nuslerp": (
        "Along the great circle by weights, of task vectors where there is a base",
        "",
        "Two models.",
    ),
    "multislerp": ("Mean in the tangent space of the mean direction", "", "At least two models."),
    "karcher": (
        "Centre of mass of the directions times the mean norm",
        "2603.04972",
        "At least two models, equal weights.",
    ),
    "model_stock": (
        "Between the base and the average, by how much task vectors agree",
        "Model stock 2403.19522",
        f"{_BASE} At least two models beside it.",
    ),
    "nearswap": ("Towards another model where it is near", "", "The base_model and one other."),
    "arcee_fusion": (
        "Another model's entries where they are outliers of change",
        "",
        "The base_model and one other. Needs tensors without NaN.",
    ),
    "sce": (
        "Entries that vary most decide the weights, minority signs are erased",
        "FuseChat 2408.07990",
        _BASE,
    ),
    "pcb": (
        "Parameters compete within and between models",
        "PCB-Merging 2410.02396",
        f"{_BASE} They compete within a tensor, in the paper within the model.",
    ),
    "widen": (
        "Weights by how much each column changed in size and direction",
        "WIDEN 2408.03092",
        _BASE,
    ),
    "ram": ("Unique changes whole, shared ones averaged", "RAM 2601.13572", _BASE),
    "ramplus_tl": (
        "Unique changes boosted, shared ones averaged",
        "RAM+ 2601.13572",
        _BASE,
    ),
    "tsv_m": ("Task singular vectors, decorrelated", _TSV, f"{_BASE} A decomposition a matrix."),
    "r_tsvm": (
        "Task singular vectors, weighted and cut by outliers",
        "R-TSVM 2502.06876",
        f"{_BASE} The paper does not give its weights: they are this package's.",
    ),
    "iso_c": ("Summed task vectors with equal singular values", _ISO, _BASE),
    "iso_cts": ("Equal singular values, common and task directions", _ISO, _BASE),
    "varm": (
        "Weighted by how far each model moved, tensor by tensor",
        "FuseChat 2408.07990",
        f"{_BASE} The coefficients of FuseChat's first version; `sce` selects and erases too.",
    ),
    "fisher": (
        "Averaged entry by entry by Fisher information",
        "Fisher merging 2111.09832",
        f"{_TEXT} Backward passes; a model in float32 three times in memory.",
    ),
    "regmean": (
        "The matrix whose outputs are nearest to every model's on its own inputs",
        "RegMean 2212.09849",
        f"{_TEXT} Other tensors are averaged.",
    ),
    "aim": (
        "A merge moved back to its base where the base's inputs are large",
        "AIM 2502.02421",
        f"{_BASE} {_TEXT} Takes one model, a merge: for instance the step before.",
    ),
    "sens": (
        "Task vectors weighted by layer by how sensitive each model is to it",
        "Sens-Merging 2502.12420",
        f"{_BASE} {_TEXT} Without the paper's factor across tasks, of which no code is published.",
    ),
    "pleas": (
        "Units matched by what they say on a text, matrices fitted to what both models compute",
        "PLeaS 2407.02447",
        f"{_TEXT} Two dense models, both in float32 in memory; they need not share a base.",
    ),
    "adamerging": (
        "Coefficients by layer or task that give the least entropy",
        "AdaMerging 2310.02575",
        f"{_BASE} {_TEXT} Backward passes; reads all models once a step.",
    ),
    "fw_hard": (
        "Step by step towards the model that a gradient points to",
        "FW-Merging 2503.12649",
        f"{_BASE} {_TEXT} Backward passes. Stays within the hull of the models.",
    ),
    "fw_soft": (
        "The models that gradients point to, weighted by learned coefficients",
        "FW-Merging 2503.12649",
        f"{_BASE} {_TEXT} Backward passes.",
    ),
    "knots": (
        "TIES in the basis that all task vectors share",
        "KnOTS 2410.19735",
        _BASE,
    ),
}

_HELPS = {
    "weight": "of each model",
    "density": "share of entries that stay, of each model",
    "gamma": "share of the largest entries that go, of each model",
    "epsilon": "half the span of probabilities (DELLA), or the size from which a change counts",
    "scale": "what tensors are multiplied with",
    "normalize": "divide by the weights that count",
    "lambda": "factor of the mixed task vector",
    "rescale": "scale what stays up for what went",
    "int8_mask": "taken from mergekit's recipes, changes nothing here",
    "t": "0 the base, 1 the other model; for nearswap the distance that is near",
    "nuslerp_row_wise": "along rows, not columns; only without nuslerp_flatten",
    "nuslerp_flatten": "a tensor is one vector",
    "normalize_weights": "weights add up to 1",
    "eps": "below this a direction is none",
    "max_iter": "steps at most",
    "tol": "the step at which it ends",
    "filter_wise": "by row, not by tensor",
    "clamp": "never beyond the base or the average",
    "select_topk": "share of the varying entries that decide",
    "select_applies_to": "deltas: the rest is left out; weights: it is merged too",
    "clip": "quantile at which magnitudes are cut",
    "inter": "normalised or raw: how models compete",
    "ratio": "times the mean significance that counts as significant; for pleas the share of "
    "neurons that stay separate",
    "calibration": "weight of significant columns",
    "r": "boost by the ratio of shared to unique changes",
    "alpha": "largest ratio",
    "norm": "divide by the norm of each model's information",
    "floor": "least information of an entry of the first model",
    "floor_all": "of every model",
    "ridge": "how strongly the average holds",
    "omega": "what is left of the change of the column with the largest input",
    "temperature": "of the softmax over the models",
    "granularity": "layer: a coefficient for each tensor and model; task: for each model",
    "loss": "entropy of the next token, or cross-entropy",
    "init": "coefficients at the start",
    "steps": "steps of the optimiser, or of Frank-Wolfe",
    "inner_steps": "steps of the optimiser in each step",
    "lr": "learning rate",
    "batch": "sequences a model's text gives to a step",
    "step_size": "factor of the step 2 / (step + 2)",
    "oracle": "inner: the inner product with the gradient; cosine: that of each tensor",
    "start": "average of the models, or the base",
    "common": "share of directions that are common",
}


def merge_methods(dialect: str) -> dict[str, MergeMethod]:
    """Every merge method of the registry in one dialect ("mergekit" or "paper"), by name.

    Those of other packages too: what they register under kind "merge" takes `dialect` and returns
    a `MergeMethod`.
    """
    found = registry.methods(kind="merge")
    return {method.name: method.load()(dialect=dialect) for method in found}


def _options(method: MergeMethod) -> tuple[Option, ...]:
    return tuple(
        _option(key, default) for key, default in {**method.per_model, **method.options}.items()
    )


def _option(key: str, default: Any) -> Option:
    required = default is REQUIRED
    kind = "float" if required or default is None else type(default).__name__
    return Option(key, kind, _HELPS[key], None if required else default, required)


for _name in ALL:
    _title, _paper, _limits = _ROWS[_name]
    register_preset(
        merge_method,
        _name,
        kind="merge",
        title=_title,
        paper=_paper,
        needs=("weights", *NEEDS.get(_name, ())),
        limits=_limits,
        settings={"name": _name},
        options=_options(merge_method(name=_name)),
    )
