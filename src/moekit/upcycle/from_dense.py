"""A dense model as a MoE of copies and slices of its own feed-forward networks.

One kernel: E experts are E / s copies of the F neurons, each cut into s slices of width F / s; a
share of the neurons may be common to all tokens as a shared expert. The slices of a copy have one
router row between them, so that with K a multiple of s the best copies are chosen whole. What the
weights leave out of the sum is put back by the down projections alone, in which a GLU is linear.
The published methods are settings of this.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moekit.core.errors import UserError
from moekit.core.result_shape import STOCK_ALIGN
from moekit.core.seeds import generator
from moekit.upcycle.assemble import MoEParts, assemble
from moekit.upcycle.converter import Job, Made, upcycler
from moekit.upcycle.ffn import FFN, dense_ffn, each, neurons, scaled
from moekit.upcycle.layer_choice import CHOICES, chosen_layers
from moekit.upcycle.routers import ROUTERS, initial_rows
from moekit.upcycle.start import ROUNDING, Start
from moekit.upcycle.targets import Target, Wanted, choose_target

WEIGHTS = ("renormalised", "raw")
MOST_TOLD = 12
PARTITIONS = ("contiguous", "snake")
# A factor that is no power of two rounds the down projections, by half a unit in the last place.
ROUNDED = 2.0**-6


@dataclass(frozen=True)
class Shape:
    """E experts, K for a token, s slices a copy, which has `routed` neurons, and the neurons that
    are shared: a `common` part of the network, or `whole` copies of it."""

    num_experts: int
    top_k: int
    slices: int
    routed: int
    common: int
    whole: int

    def __post_init__(self) -> None:
        if self.slices < 1 or self.num_experts < 1 or self.num_experts % self.slices:
            raise UserError(
                f"experts is {self.num_experts}; it must be a multiple of slices, {self.slices}."
            )
        if not 1 <= self.top_k <= self.num_experts:
            raise UserError(
                f"top_k is {self.top_k}; a token is given 1 to {self.num_experts} experts."
            )

    @property
    def copies(self) -> int:
        return self.num_experts // self.slices

    @property
    def chosen_whole(self) -> bool:
        """Whether the chosen slices make up whole copies."""
        return self.top_k % self.slices == 0

    @property
    def expert_width(self) -> int:
        return self.routed // self.slices


@dataclass(frozen=True)
class Change:
    """What sets copies apart: a share of neurons drawn anew, noise on experts as a share of a
    matrix's standard deviation, and absolute noise on the router's rows."""

    reinit: float
    noise: float
    router_noise: float

    def __post_init__(self) -> None:
        if not 0 <= self.reinit <= 1:
            raise UserError(f"reinit is {self.reinit}; it is a share, from 0 to 1.")
        if min(self.noise, self.router_noise) < 0:
            raise UserError(
                f"noise {self.noise} and router_noise {self.router_noise} must not be negative."
            )


@upcycler(
    "dense-to-moe",
    title="Copies and slices of a dense model's feed-forward networks; the methods below set it",
    needs=("weights",),
    limits="Families without a MoE class of their own kind are refused by name.",
    options={
        "experts": "experts of a layer; there are experts / slices copies of its network",
        "top_k": "experts for a token; a multiple of slices keeps copies whole",
        "slices": "slices that a copy is cut into",
        "shared": "share of the neurons that a shared expert holds for all tokens",
        "shared_copies": "whole copies beside the experts as a shared expert",
        "layers": f"which layers get experts: {CHOICES}",
        "router": f"{', '.join(ROUTERS)}: the router's rows",
        "weights": f"{' or '.join(WEIGHTS)}: of the chosen experts",
        "keep_output": "scale the down projections so that the output keeps its size",
        "partition": f"{' or '.join(PARTITIONS)}: how neurons are dealt to slices",
        "reinit": "share of the neurons of every expert that is drawn anew",
        "noise": "noise on expert weights, as a share of a matrix's standard deviation",
        "router_noise": "noise on the router's rows, absolute; unties the slices of a copy",
        "target": "the MoE family; the nearest that holds the result unless given",
    },
)
def dense_to_moe(
    job: Job,
    *,
    experts: int = 8,
    top_k: int = 2,
    slices: int = 1,
    shared: float = 0.0,
    shared_copies: int = 0,
    layers: str = "all",
    router: str = "random",
    weights: str = "renormalised",
    keep_output: bool = True,
    partition: str = "contiguous",
    reinit: float = 0.0,
    noise: float = 0.0,
    router_noise: float = 0.0,
    target: str | None = None,
) -> Made:
    """The MoE of this setting. Raises `UserError` for widths that do not divide and for what no
    stock class holds."""
    job.need_dense()
    job.need_alone()
    change = Change(reinit, noise, router_noise)
    for value, known, name in ((weights, WEIGHTS, "weights"), (partition, PARTITIONS, "partition")):
        if value not in known:
            raise UserError(f"{name} {value!r} is unknown; there are {' and '.join(known)}.")
    config = job.base.config
    chosen = chosen_layers(str(layers), job.base.num_layers)
    shape = _shape(int(config.intermediate_size), experts, top_k, slices, shared, shared_copies)
    wanted = Wanted(
        shape.num_experts,
        shape.top_k,
        shape.expert_width,
        chosen,
        weights,
        shape.common or shape.whole * shape.routed,
    )
    found = choose_target(config, wanted, target)
    factor, shared_factor = _factors(shape, weights, found) if keep_output else (1.0, 1.0)
    parts = {
        layer: MoEParts(
            _experts(job, layer, shape, factor, partition, change),
            _rows(job, layer, shape, router, change),
            _shared(job, layer, shape, shared_factor, partition),
        )
        for layer in chosen
    }
    made = found.config(config, wanted)
    start = _start(shape, weights, router, keep_output, change)
    if start.equal_to is not None and (_rounds(factor) or _rounds(shared_factor)):
        start = Start.equal(start.why, ROUNDED if _is_short(job) else ROUNDING)
    notes = []
    if found.shared_required and not wanted.shared_width:
        notes.append(f"{found.family} always has a shared expert: it is small and adds nothing.")
    return Made(made, assemble(found, made, job.base.tensors, parts), start, notes)


def _shape(
    width: int, experts: int, top_k: int, slices: int, shared: float, shared_copies: int
) -> Shape:
    if not 0 <= shared < 1:
        raise UserError(f"shared is {shared}; it is a share of the neurons, 0 to below 1.")
    if shared_copies < 0 or (shared and shared_copies):
        raise UserError(f"shared_copies is {shared_copies}: 0 or more, and not beside shared.")
    common = round(width * shared)
    shape = Shape(experts, top_k, slices, width - common, common, shared_copies)
    if shape.routed % (slices * STOCK_ALIGN):
        fitting = range(1, shape.routed // STOCK_ALIGN + 1)
        cuts = [count for count in fitting if shape.routed % (count * STOCK_ALIGN) == 0]
        raise UserError(
            f"{shape.routed} routed neurons cannot be cut into {slices} slices of equal width, a "
            f"multiple of {STOCK_ALIGN} as the kernels of stock models need; slices may be "
            f"{', '.join(map(str, cuts[:MOST_TOLD])) or 'of no number: change shared'}."
        )
    return shape


def _factors(shape: Shape, weights: str, target: Target) -> tuple[float, float]:
    """What the down projections of experts and shared expert are multiplied by."""
    # The weights that one part of the output is given; raw ones are near 1/E.
    total = 1 / shape.slices
    if weights == "raw":
        total *= shape.top_k / shape.num_experts
    whole = 1 + shape.whole
    return 1 / (total * whole), 1 / (target.shared_gain * whole)


def _experts(
    job: Job, layer: int, shape: Shape, factor: float, partition: str, change: Change
) -> list[FFN]:
    """The experts of a layer, copy by copy."""
    whole = dense_ffn(job.base, layer)
    # One slice of all neurons is the network itself, without a gather.
    cut = shape.slices > 1 or shape.common
    dealt = _dealt(_order(whole, partition)[shape.common :], shape.slices, partition) if cut else []
    found = []
    for number in range(shape.num_experts):
        expert = neurons(whole, dealt[number % shape.slices]) if cut else whole
        changed = _changed(expert, f"expert {number}", job.seed, layer, change)
        found.append(scaled(changed, factor))
    return found


def _shared(job: Job, layer: int, shape: Shape, factor: float, partition: str) -> FFN | None:
    """The shared expert of a layer: a part of the network, or copies of it side by side."""
    whole = dense_ffn(job.base, layer)
    if shape.common:
        return scaled(neurons(whole, _order(whole, partition)[: shape.common]), factor)
    if shape.whole:
        return scaled(neurons(whole, torch.arange(whole.width).repeat(shape.whole)), factor)
    return None


def _rows(job: Job, layer: int, shape: Shape, router: str, change: Change) -> Tensor:
    """The router's rows [E, D]: one for the slices of a copy, but for the noise asked for."""
    width = int(job.base.config.hidden_size)
    rows = initial_rows(router, shape.copies, width, job.seed, layer)
    rows = rows.repeat_interleave(shape.slices, 0)
    draw = generator(job.seed, "router noise", layer)
    return rows + change.router_noise * torch.randn(rows.shape, generator=draw)


def _order(ffn: FFN, partition: str) -> Tensor:
    """The neurons, the heaviest first where importance is asked for."""
    if partition == "contiguous":
        return torch.arange(ffn.width)
    sizes = ffn.gate.read().float().norm(dim=1) * ffn.up.read().float().norm(dim=1)
    return (sizes * ffn.down.read().float().norm(dim=0)).argsort(descending=True, stable=True)


def _dealt(order: Tensor, slices: int, partition: str) -> list[Tensor]:
    """The neurons of every slice: runs, or rows of one for each slice, every second reversed."""
    if partition == "contiguous":
        return list(order.chunk(slices))
    rows = order.reshape(-1, slices).clone()
    rows[1::2] = rows[1::2].flip(1)
    return list(rows.T.contiguous())


def _changed(ffn: FFN, key: str, seed: int, layer: int, change: Change) -> FFN:
    """The network with neurons drawn anew and noise on its weights, keyed by expert and layer."""
    if not change.reinit and not change.noise:
        return ffn
    drawn = round(change.reinit * ffn.width)
    new = torch.randperm(ffn.width, generator=generator(seed, f"reinit {key}", layer))[:drawn]

    def changed(part: str, matrix: Tensor) -> Tensor:
        draw = generator(seed, f"{part} of {key}", layer)
        made = matrix.float().clone()
        mean, std = float(made.mean()), float(made.std())
        fresh = mean + std * torch.randn(made.shape, generator=draw)
        # Neurons are rows of gate and up and columns of down.
        if part == "down":
            made[:, new] = fresh[:, new]
        else:
            made[new] = fresh[new]
        return made + change.noise * std * torch.randn(made.shape, generator=draw)

    return each(ffn, changed)


def _start(
    shape: Shape,
    weights: str,
    router: str,
    keep_output: bool,
    change: Change,
) -> Start:
    router_noise = change.router_noise
    if change.reinit or change.noise:
        what = "neurons of every expert are drawn anew"
        what = what if change.reinit else "there is noise on experts"
        return Start.not_equal(f"{what}, which breaks the symmetry of the copies.")
    if not shape.chosen_whole:
        return Start.not_equal(
            f"a token is given {shape.top_k} slices of copies that were cut into {shape.slices}; "
            "the sum lacks neurons."
        )
    some_copies = shape.top_k < shape.num_experts
    if shape.slices > 1 and (router_noise or (some_copies and router == "zero")):
        return Start.not_equal(
            "the slices of a copy are not chosen together: their router rows "
            f"{'differ' if router_noise else 'tie with those of other copies'}."
        )
    if weights == "raw":
        if router == "zero" and not router_noise and keep_output:
            return Start.equal(
                "all experts are copies and the zero router gives each the weight 1/E, which the "
                "down projections make up for."
            )
        return Start.not_equal(
            f"raw weights of {shape.top_k} of {shape.num_experts} experts add up to what the "
            f"router says, near {shape.top_k / shape.num_experts:.3g}"
            + (", which is made up for only on average." if keep_output else ".")
        )
    if not keep_output:
        if shape.slices == 1 and not shape.whole and not shape.common:
            return Start.equal("all experts are copies and their weights add up to one.")
        return Start.not_equal(
            f"the weights of the {shape.slices} slices of a copy add up to one, so the output is "
            "not that of the network."
        )
    if shape.slices == 1:
        return Start.equal("all experts are copies and their weights add up to one.")
    return Start.equal(
        "the slices of a copy share a router row, so the best copies are chosen whole, and the "
        "down projections make up for the weights. Two copies whose logits tie may mix, which "
        "router logits in bfloat16 do now and then."
    )


def _rounds(factor: float) -> bool:
    """Whether multiplying by `factor` rounds: powers of two do not."""
    return not math.log2(factor).is_integer()


def _is_short(job: Job) -> bool:
    return dense_ffn(job.base, 0).down.dtype != torch.float32
