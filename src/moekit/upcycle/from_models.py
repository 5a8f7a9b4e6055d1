"""A MoE whose experts are the feed-forward networks of several fine-tunes of one model.

One kernel: where the experts come from, what the rest of the model is (the mean of the models, or
the base's), and how the router starts: by chance, or from prompts that each expert is for, measured
where the router will read. The published methods are settings of this. E experts, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moekit.core.deferred import Deferred
from moekit.core.errors import UserError
from moekit.core.seeds import generator
from moekit.core.source_model import SourceModel
from moekit.upcycle.assemble import MoEParts, assemble
from moekit.upcycle.converter import Entry, Job, Made, preset, upcycler
from moekit.upcycle.domain_texts import DOMAINS_HELP, texts_of_others
from moekit.upcycle.ffn import FFN, dense_ffn, each, mean, scaled
from moekit.upcycle.layer_choice import CHOICES, chosen_layers
from moekit.upcycle.router_inputs import RouterInputs, rows_from_inputs
from moekit.upcycle.routers import ROUTERS, initial_rows
from moekit.upcycle.start import Start
from moekit.upcycle.targets import Target, Wanted, choose_target

MEASURED = ("hidden-last", "hidden-mean", "embedding")
RESTS = ("mean", "base")
# Of --data: so many documents of a domain, so many characters of each.
DOCUMENTS, TEXT = 32, 2000
# Above this a router's rows are nearly dependent (mergekit's limit).
DEGENERATE = 5.0


@upcycler(
    "models-to-moe",
    title="Feed-forward networks of several models as experts; the methods below set it",
    needs=("weights",),
    limits="All models are fine-tunes of one; families as for dense-to-moe.",
    options={
        "top_k": "experts for a token",
        "with_base": "the base's own network is an expert too, the first",
        "rest": "mean or base: everything but the experts, of all experts or the base's",
        "layers": f"which layers get experts: {CHOICES}",
        "router": f"{', '.join((*ROUTERS, *MEASURED))}: the router's rows; the last three are "
        "measured on the prompts of a recipe or on --data, by domain",
        "domains": DOMAINS_HELP,
        "centre": "take out of measured rows what all experts have in common",
        "weights": "renormalised or raw: of the chosen experts",
        "target": "the MoE family; the nearest that holds the result unless given",
    },
)
def models_to_moe(
    job: Job,
    *,
    top_k: int = 2,
    with_base: bool = False,
    rest: str = "mean",
    layers: str = "all",
    router: str = "random",
    domains: str | None = None,
    centre: bool = True,
    weights: str = "renormalised",
    target: str | None = None,
) -> Made:
    """The MoE of these models. Raises `UserError` for models that are not of one shape, for too few
    of them and for prompts that are missing or say nothing."""
    job.need_dense()
    if rest not in RESTS:
        raise UserError(f"rest {rest!r} is unknown; there are {' and '.join(RESTS)}.")
    if router not in (*ROUTERS, *MEASURED):
        raise UserError(
            f"router {router!r} is unknown; there are {', '.join((*ROUTERS, *MEASURED))}."
        )
    if router in MEASURED and job.data and not job.entries:
        job = _prompted(job, domains)
    models, entries, shared = _experts(job, with_base)
    if not 1 <= top_k <= len(models):
        raise UserError(f"top_k is {top_k}; there are {len(models)} experts.")
    for model in (*models, *(model for model, _ in shared)):
        _same_form(job.base, model)
    config = job.base.config
    chosen = chosen_layers(str(layers), job.base.num_layers)
    width = int(config.intermediate_size)
    wanted = Wanted(len(models), top_k, width, chosen, weights, width * len(shared))
    found = choose_target(config, wanted, target)
    notes: list[str] = []
    rows, gates = _rows(job, entries, shared, router, centre, chosen, notes)
    parts = {
        layer: MoEParts(
            [
                _expert(model, entry, layer, job.seed, number)
                for number, (model, entry) in enumerate(zip(models, entries, strict=True))
            ],
            rows[layer],
            _shared(found, shared, layer, job.seed, gates is not None),
            None if gates is None else gates[layer],
        )
        for layer in chosen
    }
    kept = dict(job.base.tensors) if rest == "base" else _means(models)
    made = found.config(config, wanted)
    same = all(model.directory == job.base.directory for model in models)
    plain = same and not shared and all(e == Entry(e.positive, e.negative) for e in entries)
    return Made(made, assemble(found, made, kept, parts), _start(plain, weights), notes)


def _prompted(job: Job, domains: str | None) -> Job:
    """The job with the beginnings of the first documents of its domain as prompts of each model."""
    found = texts_of_others(job, domains)
    entries = [Entry(tuple(text[:TEXT] for text in texts[:DOCUMENTS])) for texts in found]
    return replace(job, entries=tuple(entries))


def _experts(
    job: Job, with_base: bool
) -> tuple[list[SourceModel], list[Entry], list[tuple[SourceModel, Entry]]]:
    """The models of the experts, what is said of them, and the shared one, if any."""
    said = [(model, job.entry(number)) for number, model in enumerate(job.others)]
    routed = [(model, entry) for model, entry in said if not entry.shared]
    shared = [(model, entry) for model, entry in said if entry.shared]
    if with_base:
        routed.insert(0, (job.base, Entry()))
    if len(routed) < 2:
        raise UserError(f"there are {len(routed)} experts; give two models or more with --from.")
    if len(shared) > 1:
        raise UserError(f"{len(shared)} shared experts; there may be one.")
    return [model for model, _ in routed], [entry for _, entry in routed], shared


def _same_form(base: SourceModel, other: SourceModel) -> None:
    """Raise `UserError` where a model differs from the base in family, tensors or shapes."""
    if other.config.model_type != base.config.model_type:
        raise UserError(
            f"{other.name} is a {other.config.model_type} and {base.name} a "
            f"{base.config.model_type}; experts must be fine-tunes of one model."
        )
    for name, tensor in base.tensors.items():
        theirs = other.tensors.get(name)
        if theirs is None:
            raise UserError(f"{other.name} has no tensor {name}, which {base.name} has.")
        if theirs.shape != tensor.shape:
            raise UserError(
                f"{name} is {list(theirs.shape)} in {other.name} and {list(tensor.shape)} in "
                f"{base.name}; experts must be of one shape."
            )


def _means(models: Sequence[SourceModel]) -> dict[str, Deferred]:
    return {name: mean([model.tensors[name] for model in models]) for name in models[0].tensors}


def _expert(model: SourceModel, entry: Entry, layer: int, seed: int, number: int) -> FFN:
    found = dense_ffn(model, layer)
    if entry.noise_scale:

        def noisy(part: str, matrix: Tensor) -> Tensor:
            draw = generator(seed, f"noise on {part} of model {number}", layer)
            return matrix.float() + entry.noise_scale * torch.randn(matrix.shape, generator=draw)

        found = each(found, noisy)
    return scaled(found, entry.residual_scale)


def _shared(
    target: Target,
    shared: Sequence[tuple[SourceModel, Entry]],
    layer: int,
    seed: int,
    gated: bool,
) -> FFN | None:
    if not shared:
        return None
    model, entry = shared[0]
    expert = _expert(model, entry, layer, seed, -1)
    # A gate without rows halves the output; one that prompts made is meant to weigh it.
    return expert if gated else scaled(expert, 1 / target.shared_gain)


def _rows(
    job: Job,
    entries: Sequence[Entry],
    shared: Sequence[tuple[SourceModel, Entry]],
    router: str,
    centre: bool,
    chosen: Sequence[int],
    notes: list[str],
) -> tuple[dict[int, Tensor], dict[int, Tensor] | None]:
    """Rows [E, D] of the routers by layer, and of the shared expert's gate [1, D] where it has
    prompts."""
    width = int(job.base.config.hidden_size)
    if router in ROUTERS:
        return {i: initial_rows(router, len(entries), width, job.seed, i) for i in chosen}, None
    _check_prompts(entries)
    inputs = RouterInputs(job.base)
    positive = torch.stack([_measured(inputs, entry.positive, router) for entry in entries])
    negative = None
    if any(entry.negative for entry in entries):
        nothing = torch.zeros_like(positive[0])
        negative = torch.stack(
            [_measured(inputs, e.negative, router) if e.negative else nothing for e in entries]
        )
    rows, worst = {}, 0.0
    for layer in chosen:
        own = None if negative is None else negative[:, layer]
        rows[layer] = rows_from_inputs(positive[:, layer], own, centre)
        # Centred rows have no part in common and thus one dimension less than their number.
        values = torch.linalg.svdvals(rows[layer])[: len(entries) - int(centre)]
        worst = max(worst, float(values[0] / values[-1].clamp(min=1e-12)))
    if worst > DEGENERATE:
        notes.append(
            f"Router rows are nearly dependent (condition {worst:.1f}): the prompts of some "
            "experts are too much alike."
        )
    gates = None
    if shared and shared[0][1].positive:
        found = _measured(inputs, shared[0][1].positive, router)
        gates = {layer: rows_from_inputs(found[layer][None], None, False) for layer in chosen}
    return rows, gates


def _measured(inputs: RouterInputs, prompts: Sequence[str], router: str) -> Tensor:
    if router == "embedding":
        return inputs.of_embeddings(prompts)
    return inputs.of_prompts(prompts, router.removeprefix("hidden-"))


def _check_prompts(entries: Sequence[Entry]) -> None:
    without = [number for number, entry in enumerate(entries) if not entry.positive]
    if without:
        raise UserError(
            f"expert {without[0]} has no positive prompts, from which its row of the router is "
            "measured; give them in a recipe, give --data by domain, or choose router=random."
        )
    said = {(entry.positive, entry.negative) for entry in entries}
    if len(said) == 1:
        raise UserError("all experts have the same prompts, which tell none from another.")


def _start(same: bool, weights: str) -> Start:
    if same and weights == "renormalised":
        return Start.equal("all experts are copies and their weights add up to one.")
    return Start.not_equal(
        "its experts are networks of different models, mixed by a router that was not trained."
    )


def _preset(name: str, title: str, paper: str, **more: Any) -> None:
    preset(models_to_moe, name, title=title, paper=paper, needs=("weights",), **more)


_preset(
    "btx",
    "Experts from fine-tunes, everything else their mean, a new router",
    "Branch-Train-MiX 2403.07816",
    settings={"rest": "mean"},
)
_preset(
    "mergekit-moe",
    "Experts from fine-tunes, everything else the base's, a router from prompts",
    "mergekit 0.1.5",
    settings={"rest": "base", "with_base": False},
    defaults={"router": "hidden-last"},
)
