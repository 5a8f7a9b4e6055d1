"""Branch-Train-Merge: domain experts as one ensemble, or averaged by how well each fits a text.

Shapes: N experts, B sequences.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moekit.core.deferred import Deferred
from moekit.core.errors import UserError
from moekit.upcycle.check_start import in_memory
from moekit.upcycle.converter import Job, Made, upcycler
from moekit.upcycle.domain_texts import all_texts, tokenizer_of, windows_of
from moekit.upcycle.ensemble import POSTERIORS, EnsembleConfig
from moekit.upcycle.ffn import mean
from moekit.upcycle.start import Start
from moekit.upcycle.upcycled import check_same_family, names_of

LENGTH, BATCH = 256, 8
# Of the exponential mean of batches' posteriors, as published.
DECAY = 0.3
ENSEMBLE_LOADS = (
    "No class of transformers holds an ensemble: it loads through moekit (moekit eval, "
    "moekit.load_language_model, or AutoModelForCausalLM after `import moekit.upcycle.ensemble`)."
)


@upcycler(
    "branch-train-merge",
    title="Language models mixed by a posterior over their domains",
    paper="Branch-Train-Merge 2208.03306",
    needs=("weights",),
    limits="Loads through moekit; all experts of a prior above 0 run. The base is one of them.",
    options={
        "posterior": f"{' or '.join(POSTERIORS)}: what the weights of the experts follow",
        "top_k": "experts of the largest prior that are kept running; all unless given",
        "sequences": "sequences of --data that measure the prior; text of the domain it is for",
    },
)
def branch_train_merge(
    job: Job,
    *,
    posterior: str = "prefix",
    top_k: int | None = None,
    sequences: int = 100,
) -> Made:
    """The ensemble of the base and the models given with --from; they may differ in family."""
    names = _names(job)
    if posterior not in POSTERIORS:
        raise UserError(
            f"posterior {posterior!r} is unknown; there are {' and '.join(POSTERIORS)}."
        )
    if top_k is not None and not 1 <= top_k <= len(names):
        raise UserError(f"top_k is {top_k}; there are {len(names)} experts.")
    config, made = _ensemble(job, posterior)
    prior = [1 / len(names)] * len(names)
    if job.data and not job.dry_run:
        prior = measured_prior(job, config, made, sequences)
    if top_k is not None:
        prior = _largest(prior, top_k)
    config.prior = prior
    numbers = {"prior": dict(zip(names, prior, strict=True))}
    start = Start.not_equal(
        "it mixes what several models say of the next token; where the prior leaves one of them it "
        "is that one."
    )
    return Made(config, made, start, [ENSEMBLE_LOADS], numbers)


@upcycler(
    "branch-train-average",
    title="Weights of domain experts averaged by their posterior on a text",
    paper="Branch-Train-Merge 2208.03306",
    needs=("weights", "data"),
    limits="Models of one shape. The base is one of the experts.",
    options={
        "top_k": "experts of the largest posterior that are averaged; all unless given",
        "sequences": "sequences of --data that measure the posterior; text of the domain it is for",
    },
)
def branch_train_average(job: Job, *, top_k: int | None = None, sequences: int = 100) -> Made:
    """One model of the family of its sources: sum of posterior times weights."""
    names = _names(job)
    check_same_family(job)
    config, made = _ensemble(job, "prefix")
    prior = measured_prior(job, config, made, sequences)
    if top_k is not None:
        prior = _largest(prior, top_k)
    models = (job.base, *job.others)
    shares = [(m, share) for m, share in zip(models, prior, strict=True) if share > 0]
    averaged = {
        name: mean([m.tensors[name] for m, _ in shares], [share for _, share in shares])
        for name in job.base.tensors
    }
    told = ", ".join(f"{n} {w:.3g}" for n, w in zip(names, prior, strict=True))
    start = Start.not_equal(f"its weights are a mean of several models ({told}).")
    return Made(
        job.base.config, averaged, start, numbers={"prior": dict(zip(names, prior, strict=True))}
    )


def _names(job: Job) -> list[str]:
    return [Path(job.base.name).name, *names_of(job)]


def _ensemble(job: Job, posterior: str) -> tuple[EnsembleConfig, dict[str, Deferred]]:
    models = (job.base, *job.others)
    config = EnsembleConfig(
        text_config=job.base.config,
        others=[model.config.to_dict() for model in job.others],
        names=_names(job),
        prior=[1 / len(models)] * len(models),
        posterior=posterior,
    )
    made = {
        f"experts.{j}.{name}": tensor
        for j, model in enumerate(models)
        for name, tensor in model.tensors.items()
    }
    return config, made


def measured_prior(
    job: Job, config: EnsembleConfig, tensors: dict[str, Deferred], sequences: int
) -> list[float]:
    """The published "cached" prior, [N]; raises `UserError` for no text.

    An exponential mean, over batches of sequences, of the posterior behind their last token.
    """
    windows = windows_of(tokenizer_of(job.base), all_texts(job), LENGTH, sequences, job.seed)
    model: Any = in_memory(config, tensors)
    kept: Tensor | None = None
    with torch.inference_mode():
        for batch in windows.split(BATCH):
            last = model.posterior_of(batch)[:, -1].mean(0)
            kept = last if kept is None else (1 - DECAY) * kept + DECAY * last
    assert kept is not None
    return [float(share) for share in kept / kept.sum()]


def _largest(prior: list[float], top_k: int) -> list[float]:
    """The `top_k` largest of a prior, the rest zero, again of sum 1."""
    shares = torch.tensor(prior)
    kept = torch.zeros_like(shares)
    best = shares.topk(top_k).indices
    kept[best] = shares[best]
    return [float(share) for share in kept / kept.sum()]
