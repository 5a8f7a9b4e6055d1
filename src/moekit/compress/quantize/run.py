"""Quantizing as a request: parsed, checked before the model is touched, and carried out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moekit.compress.calibrate import Calibration, batches_for, open_stats, stats_for
from moekit.compress.fitted import rewrite_of
from moekit.compress.quantize.allocation import MC_BITS, allocate, budget_of
from moekit.compress.quantize.balance import draw_balanced
from moekit.compress.quantize.planning import (
    MC_MOE,
    METHODS,
    QuantizeRequest,
    plan_quantization,
)
from moekit.compress.quantize.rounding import RoundedExperts
from moekit.core.errors import UserError
from moekit.core.method_text import check_options, parse_method
from moekit.core.packed import CodecChoice
from moekit.core.plan import Action, ExpertPlan
from moekit.core.registry import registry
from moekit.core.seeds import generator
from moekit.core.view import MoEView
from moekit.profile import align_weights, profile

if TYPE_CHECKING:
    from moekit.core.load import LoadedModel
    from moekit.core.spec import MoESpec
    from moekit.core.stats import ExpertStats

Progress = Callable[[int, int], None]


@dataclass
class Quantized:
    """A plan, what computes its values, and numbers for record and card."""

    plan: ExpertPlan
    rewrite: RoundedExperts
    numbers: dict[str, Any] = field(default_factory=dict)


def request_of(
    method: str,
    codec: CodecChoice,
    *,
    bits_average: float | None = None,
    widths: tuple[int, ...] | None = None,
    allocation: str | None = None,
    router_bits: int | None = None,
    protect: Mapping[int, Collection[int]] | None = None,
) -> QuantizeRequest:
    """The request that `method` (NAME or NAME:OPTION=VALUE,...) and the options of the verb make.

    A `bits_average` without an `allocation` is MC-MoE's, and its `widths` are unless given. Raises
    `UserError` for an unknown method, an option that it does not have, or a value of another type.
    """
    name, options = parse_method(method)
    if name not in METHODS:
        raise UserError(f"--method {name!r} quantizes nothing; there are {', '.join(METHODS)}")
    found = registry.find(name, kind="quantizer")
    for option in ("codec", "group_size"):
        if option in options:
            raise UserError(f"give --{option.replace('_', '-')} in place of {method!r}")
    check_options(found, options, f"--method {name}")
    if allocation is None:
        allocation = "uniform" if bits_average is None else MC_MOE
    return QuantizeRequest(
        name,
        codec,
        bits_average=bits_average,
        allocation=allocation,
        bits=widths or MC_BITS,
        router_bits=router_bits,
        protect=protect or {},
        **options,
    )


def quantize(
    request: QuantizeRequest,
    spec: MoESpec,
    stats: ExpertStats | None = None,
    model: LoadedModel | None = None,
    *,
    source: Path | None = None,
    stats_path: Path | None = None,
    progress: Progress | None = None,
) -> Quantized:
    """Plan a quantization and make the rewrite that carries it out.

    `stats` hold `request.sets`; `model` is loaded where `request.needs_model`; `source` is its
    directory. Raises `UserError` as `plan_quantization` does.
    """
    view = None if model is None else MoEView(model.model)
    made = plan_quantization(
        request,
        spec,
        stats,
        view,
        stats_path=None if stats_path is None else str(stats_path.absolute()),
        progress=progress,
    )
    rewrite = rewrite_of(made.plan, source or Path(), stats)
    assert isinstance(rewrite, RoundedExperts)
    numbers: dict[str, Any] = {"layers": made.layers}
    if stats is not None and stats.has(0, "tokens"):
        numbers["tokens"] = stats.num_tokens(0)
    if rewrite.fallbacks:
        numbers["experts with few tokens"] = [asdict(found) for found in rewrite.fallbacks]
    return Quantized(made.plan, rewrite, numbers)


def collect_stats(
    request: QuantizeRequest,
    model: LoadedModel,
    calibration: Calibration,
    *,
    quota: int | None = None,
    progress: Progress | None = None,
) -> tuple[ExpertStats, dict[str, Any]]:
    """The statistics that `request` needs, and what is worth telling of their text.

    With `quota`, sequences are drawn beyond the calibration's tokens until each expert has that
    many (EAQuant), or the text ends; the experts that stay short are told by layer.
    """
    if quota is None or calibration.stats is not None:
        return stats_for(model, calibration, request.sets, progress=progress), {}
    align_weights(model.model)
    first = len(batches_for(model, calibration))
    everything = batches_for(model, replace(calibration, max_tokens=None))
    view = MoEView(model.model)
    drawn = draw_balanced(view, everything, first, quota)
    stats = profile(
        view,
        drawn.batches,
        sets=request.sets,
        all_tokens=calibration.all_tokens,
        seed=calibration.seed,
        progress=progress,
    )
    stats.metadata = calibration.to_dict()
    short = {str(view[position].index): experts for position, experts in drawn.short.items()}
    return stats, {"quota": drawn.quota, "sequences": len(drawn.batches), "below quota": short}


def stats_at(request: QuantizeRequest, spec: MoESpec, path: Path) -> ExpertStats:
    """Open the statistics in `path`; `UserError` where they are others or lack a set."""
    return open_stats(path, spec, request.sets)


def forecast_of(request: QuantizeRequest, spec: MoESpec, seed: int = 0) -> Quantized:
    """A plan of the bytes that `request` leads to, without statistics or weights."""
    plain = replace(
        request,
        method="rtn",
        solver=None,
        bits_average=None,
        bits=MC_BITS,
        allocation="uniform",
        router_bits=None,
    )
    made = quantize(plain, spec)
    if request.bits_average is None:
        return made
    layers = {}
    for layer in spec.per_layer:
        count = layer.num_experts
        budget = budget_of(request.bits_average, count, request.bits, request.at_least)
        source = generator(seed, "forecast", layer.layer_index)
        # Any costs that fall with the bits spend the budget.
        costs = torch.rand(count, 1, generator=source) / torch.tensor(request.bits)
        bits = allocate(costs, request.bits, budget, request.at_least)
        layers[layer.layer_index] = {e: Action(bits=b) for e, b in enumerate(bits)}
    plan = replace(made.plan, layers=layers)
    rewrite = rewrite_of(plan, Path())
    assert isinstance(rewrite, RoundedExperts)
    return Quantized(plan, rewrite)
