"""Twin-Merging and FlexMoRE: fine-tunes as one shared model and low-rank residues to it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moekit.core.architecture import meta_model
from moekit.core.deferred import Deferred, Region
from moekit.core.errors import UserError
from moekit.core.source_model import SourceModel
from moekit.ops.lowrank import Factors, balanced
from moekit.upcycle.check_start import in_memory
from moekit.upcycle.converter import Job, Made, upcycler
from moekit.upcycle.domain_texts import DOMAINS_HELP, texts_of_others
from moekit.upcycle.ffn import constant
from moekit.upcycle.model.blocks import PROJECTIONS, mlp_blocks
from moekit.upcycle.model.residue_routers import POOLS
from moekit.upcycle.model.residues import MATRIX_TYPES, is_whole, rank_of
from moekit.upcycle.residue_training import position_axes, train_example_router
from moekit.upcycle.router_inputs import RouterInputs, rows_from_inputs
from moekit.upcycle.routers import initial_rows
from moekit.upcycle.start import Start
from moekit.upcycle.upcycled import (
    LOADS_HERE,
    PREFIX,
    below_base,
    check_same_family,
    config_of,
    names_of,
)

# A matrix's factors are asked for one after the other: left of all experts, then right.
KEPT_FACTORS = 16
# Text of a domain that its router row is measured on.
DOCUMENTS, HEAD_CHARACTERS = 64, 800


@upcycler(
    "twin-merging",
    title="A merged model and low-rank residues of every fine-tune, mixed by what the prompt is",
    paper="Twin-Merging 2406.15479",
    needs=("weights", "data", "training"),
    limits="Loads through moekit; dense models. Every prompt is read twice: once to route it.",
    options={
        "domains": DOMAINS_HELP,
        "scale": "of the sum of task vectors in the shared model",
        "share": "rank of a residue, as a share of a matrix's smaller side",
        "pool": "prefix: a token is routed by what precedes it; sequence: all by the whole prompt",
        "epochs": "passes of the router over its examples",
        "learning_rate": "of the router",
        "examples": "windows of text a domain that the router learns from",
    },
)
def twin_merging(
    job: Job,
    *,
    domains: str | None = None,
    scale: float = 0.3,
    share: float = 0.1,
    pool: str = "prefix",
    epochs: int = 50,
    learning_rate: float = 5e-4,
    examples: int = 200,
) -> Made:
    """The shared model, base + scale * sum of task vectors, and what each fine-tune is more."""
    job.need_dense()
    names = names_of(job)
    check_same_family(job)
    if not 0 <= share <= 1:
        raise UserError(f"share is {share}; it is a share of a matrix's smaller side, 0 to 1.")
    if pool not in POOLS:
        raise UserError(f"pool {pool!r} is unknown; there are {' and '.join(POOLS)}.")
    texts = texts_of_others(job, domains)
    shared = {name: _merged(job, name, scale) for name in job.base.tensors}
    model = in_memory(job.base.config, shared)
    sites = position_axes(model, shared)
    config = config_of(
        job.base, "residues", mix="weights", experts=names, share=share, pool=pool, sites=sites
    )
    router, accuracy = train_example_router(
        job,
        model,
        texts,
        pool,
        epochs=0 if job.dry_run else epochs,
        learning_rate=learning_rate,
        examples=examples,
    )
    dtype = next(iter(shared.values())).dtype
    made = below_base(shared)
    for name, value in router.items():
        kept = value.to(dtype) if value.is_floating_point() else value
        made[f"part.router.{name}"] = constant(kept)
    dense = meta_model(job.base.config)
    for name, tensor in shared.items():
        path, _, leaf = name.rpartition(".")
        if path in sites:
            matrix = leaf == "weight" and type(dense.get_submodule(path)) in MATRIX_TYPES
            residues = _matrix_residues if matrix else _vector_residues
            made |= residues(job.others, name, tensor, config.part)
    notes = [LOADS_HERE]
    if pool == "sequence":
        notes.append("A token is routed by later ones too: it generates, but eval refuses it.")
    start = Start.not_equal(
        "it is the shared model plus the residues that its router weighs; with the weight 1 for "
        f"one fine-tune it is that one up to what rank {share:g} loses."
    )
    return Made(config, made, start, notes, {"router_accuracy": accuracy})


@upcycler(
    "flexmore",
    title="Domain experts as the base's FFN plus low-rank residues of mixed rank",
    paper="FlexMoRE 2602.08818",
    needs=("weights",),
    limits="Loads through moekit; the models may differ from the base in their FFNs only. Router "
    "rows are what a layer reads on each domain of --data, random without.",
    options={
        "ranks": "one rank for all experts, or one an expert, separated by spaces",
        "top_k": "experts a token; the base counts as one",
        "domains": DOMAINS_HELP,
    },
)
def flexmore(
    job: Job,
    *,
    ranks: int | str = 64,
    top_k: int = 2,
    domains: str | None = None,
) -> Made:
    """The base as public expert 0, and each fine-tune as it plus residues."""
    job.need_dense()
    names = ["public", *names_of(job)]
    check_same_family(job)
    if not 1 <= top_k <= len(names):
        raise UserError(f"top_k is {top_k}; a token may be given 1 to {len(names)} experts.")
    ffns = {block.path: block.index for block in mlp_blocks(meta_model(job.base.config))}
    _check_shared(job, tuple(f"{path}." for path in ffns))
    all_ranks = [0, *_ranks(ranks, len(job.others))]
    config = config_of(
        job.base, "residues", mix="outputs", experts=names, ranks=all_ranks, top_k=top_k
    )
    made = below_base(job.base.tensors)
    width = int(job.base.config.hidden_size)
    rows = _domain_rows(job, texts_of_others(job, domains)) if job.data else None
    for path, layer in ffns.items():
        for projection in PROJECTIONS:
            name = f"{path}.{projection}.weight"
            found = _matrix_residues(
                (job.base, *job.others), name, job.base.tensors[name], config.part
            )
            own = f"{PREFIX}{path}.{projection}.residues.weight"
            into = f"{PREFIX}{path}.residues.{projection}"
            made |= {into + n.removeprefix(own): tensor for n, tensor in found.items()}
        if rows is None:
            own_rows = initial_rows("random", len(names), width, job.seed, layer)
        else:
            own_rows = rows[layer]
        dtype = job.base.tensors[f"{path}.{PROJECTIONS[0]}.weight"].dtype
        made[f"{PREFIX}{path}.router.weight"] = constant(own_rows.to(dtype))
        made[f"{PREFIX}{path}.router.bias"] = constant(torch.zeros(len(names) - 1, dtype=dtype))
    start = Start.not_equal(
        "a token gets the FFNs of several experts by the router's weights. A token whose weight is "
        "1 for one expert is computed by it, up to what its rank loses; nothing at full rank."
    )
    notes = [LOADS_HERE, "`--method expand-residues` writes it for a stock MoE class."]
    return Made(config, made, start, notes)


def _ranks(text: int | str, count: int) -> list[int]:
    try:
        found = [int(part) for part in str(text).split()]
    except ValueError:
        raise UserError(f"ranks {text!r}: whole numbers separated by spaces.") from None
    if len(found) == 1:
        found *= count
    if len(found) != count or min(found) < 0:
        raise UserError(
            f"ranks {text!r}: one number of 0 or more, or one for each of {count} experts."
        )
    return found


def _domain_rows(job: Job, texts: Sequence[Sequence[str]]) -> list[Tensor]:
    """Router rows [E, D] of every layer by what the FFN reads on each domain's text.

    Zeros for the base, which is of no domain.
    """
    inputs = RouterInputs(job.base)
    heads = [[text[:HEAD_CHARACTERS] for text in docs[:DOCUMENTS]] for docs in texts]
    means = torch.stack([inputs.of_prompts(docs, "mean") for docs in heads], 1)
    rows = [rows_from_inputs(of_layer, None, centre=True) for of_layer in means]
    return [torch.cat([torch.zeros(1, row.shape[1]), row]) for row in rows]


def _check_shared(job: Job, own: tuple[str, ...]) -> None:
    """Raise `UserError` where a model differs from the base outside of its FFNs."""
    for other in job.others:
        for name, tensor in job.base.tensors.items():
            if name.startswith(own):
                continue
            for row, piece in tensor.pieces():
                theirs = other.tensors[name]
                same = theirs.rows(row, row + len(piece)) if piece.ndim else theirs.read()
                if not torch.equal(piece, same):
                    raise UserError(
                        f"{name} of {other.name} differs from that of {job.base.name}: experts "
                        "share all but their FFNs. twin-merging takes models that differ anywhere."
                    )


def _merged(job: Job, name: str, scale: float) -> Deferred:
    """base + scale * (sum of fine-tunes - base), in float32, block by block."""
    base = job.base.tensors[name]
    others = [other.tensors[name] for other in job.others]

    def read(region: Region) -> Tensor:
        start = base.read(region).float()
        moved = sum((other.read(region).float() - start for other in others), torch.zeros(()))
        return (start + scale * moved).to(base.dtype)

    return Deferred(base.shape, base.dtype, read)


def _vector_residues(
    models: Sequence[SourceModel], name: str, shared: Deferred, part: Any
) -> dict[str, Deferred]:
    """What the models are more than the tensor `shared`, whole."""
    path, _, leaf = name.rpartition(".")
    deltas = [_delta(model.tensors[name], shared) for model in models]
    whole = [_computed(shared.shape, shared.dtype, delta) for delta in deltas]
    return {f"{PREFIX}{path}.residues.vectors.{leaf}": _stacked(whole)}


def _matrix_residues(
    models: Sequence[SourceModel], name: str, shared: Deferred, part: Any
) -> dict[str, Deferred]:
    """What the models are more than the matrix `shared`, as `MatrixResidues` keeps it."""
    path = name.rpartition(".")[0]
    deltas = [_delta(model.tensors[name], shared) for model in models]
    shape = (int(shared.shape[0]), int(shared.shape[1]))
    ranks = [rank_of(part, expert, shape) for expert in range(len(models))]
    factored = [
        functools.partial(_factors, delta, rank)
        for delta, rank in zip(deltas, ranks, strict=True)
        if rank and not is_whole(rank, shape)
    ]
    small = [rank for rank in ranks if not is_whole(rank, shape)]
    full = [
        _computed(shape, shared.dtype, functools.partial(_low, delta, rank, shape))
        for delta, rank in zip(deltas, ranks, strict=True)
        if is_whole(rank, shape)
    ]
    own, dtype = f"{PREFIX}{path}.residues.weight", shared.dtype

    def side(place: int) -> Callable[[], Tensor]:
        return lambda: torch.cat([get()[place] for get in factored], 1 - place)

    total, made = sum(small), {}
    if total:
        made[f"{own}.left"] = _computed((shape[0], total), dtype, side(0))
        made[f"{own}.right"] = _computed((total, shape[1]), dtype, side(1))
    if full:
        made[f"{own}.whole"] = _stacked(full)
    return made


def _delta(tensor: Deferred, shared: Deferred) -> Callable[[], Tensor]:
    return lambda: tensor.read().float() - shared.read().float()


@functools.lru_cache(maxsize=KEPT_FACTORS)
def _factors(delta: Callable[[], Tensor], rank: int) -> Factors:
    return balanced(delta(), rank)


def _low(delta: Callable[[], Tensor], rank: int, shape: tuple[int, int]) -> Tensor:
    """A residue that takes less room as a matrix, all of it or its best part of that rank."""
    return delta() if rank >= min(shape) else balanced(delta(), rank).product()


def _computed(shape: Sequence[int], dtype: torch.dtype, get: Callable[[], Tensor]) -> Deferred:
    def read(region: Region) -> Tensor:
        return get()[tuple(slice(a, b) for a, b in region)].to(dtype)

    return Deferred(torch.Size(shape), dtype, read)


def _stacked(tensors: Sequence[Any]) -> Deferred:
    made: Any = torch.stack(list(tensors))
    return made
