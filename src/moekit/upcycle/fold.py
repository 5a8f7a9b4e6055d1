"""The way back from residues: the experts of a stock MoE, or one dense model for one task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moekit.core.architecture import meta_model
from moekit.core.deferred import Deferred
from moekit.core.errors import UserError
from moekit.upcycle.assemble import MoEParts, assemble
from moekit.upcycle.converter import Job, Made, upcycler
from moekit.upcycle.ffn import FFN, mapped
from moekit.upcycle.model.blocks import PROJECTIONS, mlp_blocks
from moekit.upcycle.model.residues import MatrixResidues, rank_of
from moekit.upcycle.start import ROUNDING, Start
from moekit.upcycle.targets import Wanted, choose_target
from moekit.upcycle.upcycled import PREFIX, part_of

# Sums of products rounded once more, to bfloat16 or float16.
ROUNDED = 2.0**-5


@upcycler(
    "expand-residues",
    title="FlexMoRE's residues written out as the experts of a stock MoE",
    paper="FlexMoRE 2602.08818",
    needs=("weights",),
    limits="Models made by flexmore whose router has no bias: no stock class holds one.",
    options={"target": "the MoE family; the nearest that holds the result unless given"},
)
def expand_residues(job: Job, *, target: str | None = None) -> Made:
    """The MoE of a stock class that computes the same; `UserError` where there is none."""
    part = part_of(job, "residues", "flexmore")
    if part["mix"] != "outputs":
        raise UserError(
            f"{job.base.name} mixes its residues in the weights of the whole model, token by "
            "token; no MoE class of transformers does that. fold-residues makes it dense."
        )
    text = job.base.config.text_config
    layers = {block.index: block.path for block in mlp_blocks(meta_model(text))}
    tensors = job.base.tensors
    routers, count = {}, len(part["experts"])
    for layer, path in layers.items():
        bias = tensors[f"{PREFIX}{path}.router.bias"].read().clamp(max=0)
        if bool((bias != 0).any()):
            raise UserError(
                f"{job.base.name}: the router of layer {layer} has a bias, and no stock MoE class "
                "with the attention of this family has one in its router. It runs through moekit."
            )
        routers[layer] = tensors[f"{PREFIX}{path}.router.weight"].read()
    wanted = Wanted(count, part["top_k"], int(text.intermediate_size), tuple(layers), "raw")
    found = choose_target(text, wanted, target)
    made = found.config(text, wanted)
    parts = {
        layer: MoEParts(
            [_ffn(tensors, path, expert, part) for expert in range(count)], routers[layer]
        )
        for layer, path in layers.items()
    }
    kept = {
        name.removeprefix(PREFIX): tensor
        for name, tensor in tensors.items()
        if not any(name.startswith(f"{PREFIX}{path}.") for path in layers.values())
    }
    start = Start.equal("the same experts, written out.", _tolerance(job))
    return Made(made, assemble(found, made, kept, parts), start)


@upcycler(
    "fold-residues",
    title="One dense model for one task, of a model of residues",
    paper="Twin-Merging 2406.15479, FlexMoRE 2602.08818",
    needs=("weights",),
    limits="Models made by twin-merging or flexmore. The router is gone.",
    options={
        "expert": "the one expert that is kept",
        "gates": "weights of the experts instead, separated by spaces; of twin-merging only",
    },
)
def fold_residues(job: Job, *, expert: str | None = None, gates: str | None = None) -> Made:
    """The dense model with the gates fixed; `UserError` where they cannot be folded."""
    part = part_of(job, "residues", "twin-merging or flexmore")
    weights = _weights(part, expert, gates)
    text = job.base.config.text_config
    prefixed = {
        name.removeprefix(PREFIX): tensor
        for name, tensor in job.base.tensors.items()
        if name.startswith(PREFIX)
    }
    made: dict[str, Deferred] = {}
    for name in meta_model(text).state_dict():
        if name in prefixed:
            made[name] = _folded(prefixed, name, part, weights)
    chosen = ", ".join(f"{n} {w:g}" for n, w in zip(part["experts"], weights, strict=True))
    start = Start.not_equal(f"the gates are fixed ({chosen}) and no longer follow the text.")
    return Made(text, made, start)


def _weights(part: Any, expert: str | None, gates: str | None) -> list[float]:
    names = part["experts"]
    if (expert is None) == (gates is None):
        raise UserError(f"give either expert (one of {', '.join(names)}) or gates, one an expert.")
    if expert is not None:
        if str(expert) not in names:
            raise UserError(f"expert {expert!r} is not there; there are {', '.join(names)}.")
        return [float(name == str(expert)) for name in names]
    try:
        found = [float(piece) for piece in str(gates).split()]
    except ValueError:
        raise UserError(f"gates {gates!r}: numbers separated by spaces.") from None
    if len(found) != len(names):
        raise UserError(f"gates has {len(found)} numbers for {len(names)} experts.")
    if part["mix"] == "outputs" and sorted(found) != [0.0] * (len(found) - 1) + [1.0]:
        raise UserError(
            "the experts of flexmore are mixed in their outputs, and a mean of outputs is no dense "
            "FFN of that width: fold one expert."
        )
    return found


def _folded(tensors: dict[str, Deferred], name: str, part: Any, weights: list[float]) -> Deferred:
    path, _, leaf = name.rpartition(".")
    shared = tensors[name]
    if part["mix"] == "outputs":
        block, _, projection = path.rpartition(".")
        residues = f"{block}.residues.{projection}"
    else:
        residues = f"{path}.residues.weight"
        vectors = tensors.get(f"{path}.residues.vectors.{leaf}")
        if vectors is not None:
            stacked = vectors
            return mapped(shared, lambda w: w.float() + _sum(stacked.read(), weights))
    if leaf != "weight" or not any(name.startswith(f"{residues}.") for name in tensors):
        return shared
    kept = [expert for expert, weight in enumerate(weights) if weight]
    shape = (int(shared.shape[0]), int(shared.shape[1]))

    def add(matrix: Tensor) -> Tensor:
        total = matrix.float()
        for expert in kept:
            total = total + weights[expert] * _residue(tensors, residues, expert, part, shape)
        return total

    return mapped(shared, add)


def _sum(stacked: Tensor, weights: list[float]) -> Tensor:
    return torch.einsum("e,e...->...", torch.tensor(weights), stacked.float())


def _residue(
    tensors: Mapping[str, Deferred], name: str, expert: int, part: Any, shape: tuple[int, int]
) -> Tensor:
    """The residue [O, I] of an expert to the matrix whose residues lie below `name`."""
    with torch.device("meta"):
        held = MatrixResidues(shape, [rank_of(part, e, shape) for e in range(len(part["experts"]))])
    if not held.has(expert):
        return torch.zeros(())
    if expert in held.whole_of:
        place = held.whole_of.index(expert)
        return tensors[f"{name}.whole"].rows(place, place + 1)[0].float()
    start = sum(held.ranks[:expert])
    stop = start + held.ranks[expert]
    left, right = tensors[f"{name}.left"], tensors[f"{name}.right"]
    return left.read()[:, start:stop].float() @ right.rows(start, stop).float()


def _ffn(tensors: Mapping[str, Deferred], path: str, expert: int, part: Any) -> FFN:
    """One expert's FFN, written out when it is read."""

    def written(projection: str) -> Deferred:
        residues = f"{PREFIX}{path}.residues.{projection}"
        shared = tensors[f"{PREFIX}{path}.{projection}.weight"]
        shape = (int(shared.shape[0]), int(shared.shape[1]))
        if not part["ranks"][expert]:
            return shared
        return mapped(
            shared, lambda w: w.float() + _residue(tensors, residues, expert, part, shape)
        )

    gate, up, down = map(written, PROJECTIONS)
    return FFN(f"{path} expert {expert}", gate, up, down)


def _tolerance(job: Job) -> float:
    short = any(t.dtype in (torch.bfloat16, torch.float16) for t in job.base.tensors.values())
    return ROUNDED if short else ROUNDING
