"""A larger MoE out of a MoE: experts are duplicated, the useful ones more often.

E experts before, E' after, K chosen for a token. Every tensor with an expert axis is the old one
with some of its entries repeated, so any family grows, in its own storage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moekit.core.architecture import meta_model
from moekit.core.deferred import Deferred
from moekit.core.errors import UserError
from moekit.core.expert_source import ExpertSource, expert_sources
from moekit.core.family_table import CORRECTION_BIAS_NAMES, TOP_K_NAMES
from moekit.core.layer_spec import LayerSpec
from moekit.core.layout import expert_axes, layer_of, with_num_experts
from moekit.core.registry import registry
from moekit.core.seeds import generator
from moekit.core.stats import ExpertStats
from moekit.upcycle.converter import Job, Made, upcycler
from moekit.upcycle.ffn import mapped
from moekit.upcycle.start import Start

UNIFORM, WEIGHT_NORM, GRADIENT = "uniform", "weight-norm", "gradient"
UTILITIES = (UNIFORM, WEIGHT_NORM, GRADIENT)


@upcycler(
    "expert-upcycling",
    title="A MoE with more experts: copies, of the useful experts more than of others",
    paper="Expert Upcycling 2604.19835",
    needs=("weights",),
    limits="Routers that choose by a table of tokens cannot be grown. gradient and saliencies read "
    "--stats.",
    options={
        "experts": "experts afterwards; twice as many unless given",
        "top_k": "experts for a token afterwards; as many as before unless given",
        "utility": f"{', '.join(UTILITIES)} (squared gradients), or a method of `moekit list "
        "--kind saliency`",
        "max_copies": "copies of one expert before all others have as many",
        "temperature": "draw sources by the softmax of utility over this instead of the best first",
        "router_noise": "noise on the copies' selection bias, or on their rows where there is "
        "none, as a share of the standard deviation; unties them",
    },
)
def expert_upcycling(
    job: Job,
    *,
    experts: int | None = None,
    top_k: int | None = None,
    utility: str = WEIGHT_NORM,
    max_copies: int = 3,
    temperature: float | None = None,
    router_noise: float = 0.01,
) -> Made:
    """The larger MoE. Raises `UserError` for a number of experts that is not larger, for a utility
    whose statistics are missing, and for routers that cannot be grown."""
    job.need_mixture()
    job.need_alone()
    config = job.base.config
    sources = expert_sources(dict(job.base.tensors), config)
    counts = {source.spec.num_experts for source in sources}
    if len(counts) > 1:
        raise UserError(
            f"the layers have {sorted(counts)} experts; they must have the same number."
        )
    before = counts.pop()
    after = 2 * before if experts is None else experts
    if after <= before:
        raise UserError(f"experts is {after}; the model has {before} already.")
    if max_copies < 1 or router_noise < 0 or (temperature is not None and temperature <= 0):
        raise UserError("max_copies is 1 or more, router_noise 0 or more, temperature above 0.")
    _check_growable(sources, after, utility)
    grown = with_num_experts(config, after)
    if top_k is not None:
        setattr(grown.get_text_config(decoder=True), _top_k_field(grown), top_k)
    model = meta_model(config)
    axes = expert_axes(model, meta_model(with_num_experts(config, after)))
    paths = {source.spec.path: position for position, source in enumerate(sources)}
    scores = _utilities(job, sources, utility)
    orders = []
    for position, source in enumerate(sources):
        draw = generator(job.seed, "sources of copies", source.spec.layer_index)
        orders.append(
            _order(scores[position], after, source.spec, utility, max_copies, temperature, draw)
        )
    made: dict[str, Deferred] = dict(job.base.tensors)
    noisy = [
        _noisy(source, [name for name in axes if layer_of(name, {source.spec.path: 0}) == 0], made)
        for source in sources
    ]
    for name, axis in axes.items():
        tensor: Any = made[name]
        place = layer_of(name, paths)
        assert place is not None
        order = orders[place]
        entries = axis.entries(order, before, tensor.shape[axis.axis])
        grown_tensor: Any = tensor.index_select(axis.axis, torch.tensor(entries))
        if router_noise and name in noisy[place]:
            grown_tensor = _untied(grown_tensor, order, axis.axis, router_noise, job.seed, name)
        made[name] = grown_tensor
    copies = {s.spec.path: order for s, order in zip(sources, orders, strict=True)}
    start = _start(sources, after, top_k, utility, router_noise, _top_k_field(grown))
    return Made(grown, made, start, numbers={"sources_of_experts": copies})


def most_useful(
    utility: Tensor,
    count: int,
    max_copies: int,
    temperature: float | None = None,
    draw: torch.Generator | None = None,
) -> list[int]:
    """The `count` experts to copy, by utility [E]: always the most useful one that was copied fewer
    than `max_copies` times; when all are full the counts start anew. With a temperature experts are
    drawn in its place, with the softmax of utility over it."""
    found: list[int] = []
    copied = torch.zeros(len(utility), dtype=torch.long)
    shares = (
        utility.double() if temperature is None else (utility.double() / temperature).softmax(0)
    )
    while len(found) < count:
        if bool((copied >= max_copies).all()):
            copied.zero_()
        open_ = shares.masked_fill(copied >= max_copies, -torch.inf if temperature is None else 0.0)
        if temperature is None:
            expert = int(open_.argmax())
        else:
            # Utilities far apart leave probabilities of zero, which cannot be drawn from.
            open_ = open_ if float(open_.sum()) > 0 else (copied < max_copies).double()
            expert = int(torch.multinomial(open_, 1, generator=draw))
        copied[expert] += 1
        found.append(expert)
    return found


def _order(
    scores: Tensor,
    after: int,
    spec: LayerSpec,
    utility: str,
    max_copies: int,
    temperature: float | None,
    draw: torch.Generator,
) -> list[int]:
    """For every place the expert that comes there: group by group, the old ones, then copies."""
    size = spec.num_experts // spec.num_groups
    more = after // spec.num_groups - size
    order: list[int] = []
    for group in range(spec.num_groups):
        own = list(range(group * size, (group + 1) * size))
        if utility == UNIFORM:
            copies = own * (more // size)
        else:
            chosen = most_useful(scores[own], more, max_copies, temperature, draw)
            copies = [own[expert] for expert in chosen]
        order += own + copies
    return order


def _check_growable(sources: Sequence[ExpertSource], after: int, utility: str) -> None:
    for source in sources:
        spec = source.spec
        if spec.selection == "hash":
            raise UserError(
                f"{spec.path} chooses experts by a table of tokens; it cannot be grown."
            )
        if spec.num_null_experts:
            raise UserError(f"{spec.path} has choices without an expert; it cannot be grown.")
        if after % spec.num_groups:
            raise UserError(
                f"experts is {after}; {spec.path} chooses among {spec.num_groups} equal groups."
            )
        if utility == UNIFORM and after % spec.num_experts:
            raise UserError(
                f"experts is {after}, no multiple of {spec.num_experts}, which utility=uniform "
                "needs."
            )


def _utilities(job: Job, sources: Sequence[ExpertSource], utility: str) -> list[Tensor]:
    """Utility [E] of the experts of every layer, float64."""
    if utility == UNIFORM:
        return [torch.zeros(source.spec.num_experts) for source in sources]
    if utility == WEIGHT_NORM:
        return [_weight_norms(source) for source in sources]
    if job.stats is None:
        raise UserError(f"utility {utility!r} is read from statistics: give --stats.")
    _check_stats(job.stats, sources)
    if utility == GRADIENT:
        positions = range(len(sources))
        return [job.stats.get(p, "neuron_fisher").double().sum((1, 2)) for p in positions]
    found: list[Tensor] = registry.find(utility, kind="saliency").load()(job.stats)
    return [scores.double() for scores in found]


def _check_stats(stats: ExpertStats, sources: Sequence[ExpertSource]) -> None:
    theirs = [(layer.index, layer.num_experts) for layer in stats.layers]
    own = [(source.spec.layer_index, source.spec.num_experts) for source in sources]
    if theirs != own:
        raise UserError("--stats are those of another model: its layers or experts differ.")


def _weight_norms(source: ExpertSource) -> Tensor:
    """Norms of the first matrix of every expert."""
    found = []
    for expert in range(source.spec.num_experts):
        read = source.read(expert)
        first = read.up if read.gate is None else read.gate
        assert first is not None
        found.append(first.double().norm())
    return torch.stack(found)


def _noisy(
    source: ExpertSource, names: Sequence[str], tensors: Mapping[str, Deferred]
) -> list[str]:
    """What unties copies: the selection bias, or the router's rows where that is the same for all
    experts, as before training, or is not there."""
    biases = [name for name in names if name.endswith(CORRECTION_BIAS_NAMES)]
    if any(float(tensors[name].read().float().std()) > 0 for name in biases):
        return biases
    return [n for n in names if n not in source.names and n not in biases and tensors[n].ndim == 2]


def _untied(
    tensor: Deferred, order: Sequence[int], axis: int, noise: float, seed: int, name: str
) -> Deferred:
    """The grown tensor with noise on the entries of copies; the first of an expert stays."""
    is_copy = torch.tensor([order.index(expert) < place for place, expert in enumerate(order)])

    def change(whole: Tensor) -> Tensor:
        draw = generator(seed, f"noise on copies in {name}")
        made = whole.float().movedim(axis, 0).clone()
        added = noise * made.std() * torch.randn(made.shape, generator=draw)
        made[: len(order)][is_copy] += added[: len(order)][is_copy]
        return made.movedim(0, axis)

    return mapped(tensor, change)


def _top_k_field(config: Any) -> str:
    text = config.get_text_config(decoder=True)
    return next(name for name in TOP_K_NAMES if isinstance(getattr(text, name, None), int))


def _start(
    sources: Sequence[ExpertSource],
    after: int,
    top_k: int | None,
    utility: str,
    noise: float,
    field: str,
) -> Start:
    spec = sources[0].spec
    times, chosen = after // spec.num_experts, top_k or spec.top_k
    if utility != UNIFORM:
        return Start.not_equal(
            "some experts have more copies than others, which take more of the places of a token."
        )
    if noise:
        return Start.not_equal("noise unties the copies; without it (router_noise=0) it is said.")
    if not _adds_up(spec) or chosen % times:
        return Start.not_equal(
            f"{chosen} places do not hold {times} copies of an expert each, or the weights of "
            "copies do not add up to that of the expert under this router."
        )
    why = f"an expert is chosen with all its {times} copies, whose weights add up to its own."
    if chosen == times * spec.top_k:
        return Start.equal(why)
    fewer = chosen // times
    return Start.equal(why, to=f"the source with top_k {fewer}", source_changes={field: fewer})


def _adds_up(spec: LayerSpec) -> bool:
    """Whether the weights of copies add up to that of the expert alone."""
    # Copies share a softmax, but each has the whole selection bias.
    halved = spec.score == "softmax" and not spec.has_correction_bias
    known = halved or (spec.score == "sigmoid" and bool(spec.normalize))
    plain = spec.selection == "topk" and spec.num_groups == 1 and not spec.normalizes_with_shared
    return known and plain and not spec.scales_input
