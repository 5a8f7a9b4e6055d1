"""From statistics to the plan of a quantization: bits by expert, scales by channel.

Shapes: D width, F expert width, E experts, B widths.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from moekit.compress.quantize.allocation import (
    MC_AT_LEAST,
    MC_BITS,
    allocate,
    budget_of,
    mc_costs,
)
from moekit.compress.quantize.autoround import STEPS
from moekit.compress.quantize.awq import search_awq
from moekit.compress.quantize.block_error import rounding_errors
from moekit.compress.quantize.block_inputs import BlockInputs
from moekit.compress.quantize.input_scaling import InputScaling, scalings_of
from moekit.compress.quantize.rounding import MIN_TOKENS, NEAREST, POOLED, RoundingOptions
from moekit.compress.quantize.router_rounding import align_router
from moekit.compress.quantize.smoothing import input_peaks, middle_scales, shared_scale
from moekit.core.codec_choice import DEFAULT_CODEC, codec_at, nominal_bits
from moekit.core.errors import UserError
from moekit.core.layer import MoELayer
from moekit.core.packed import CodecChoice
from moekit.core.plan import Action, ExpertPlan, Fingerprint, Fit
from moekit.core.plan_tensors import PlanTensors
from moekit.core.spec import MoESpec
from moekit.core.stats import ExpertStats
from moekit.core.view import MoEView
from moekit.ops.gptq import BLOCK, DAMP

RTN, GPTQ, AUTOROUND, AWQ, EAQUANT = METHODS = ("rtn", "gptq", "autoround", "awq", "eaquant")
UNIFORM, MC_MOE = ALLOCATIONS = ("uniform", "mc-moe")
PROTECTED_BITS = 16
# Tokens that a search runs through the experts, again and again.
SEARCHED_TOKENS = 1024


@dataclass(frozen=True)
class QuantizeRequest:
    """What is asked for.

    `codec` is the kind of codec, and the codec itself where `bits_average` is None; else bits are
    allocated by `allocation` over the widths `bits` so that a layer's experts have that many on
    average, some of each of `at_least`. `router_bits` rounds the routers with their choices kept
    (EAQuant). Experts in `protect` (by decoder layer) keep 16 bits. The rest are options of
    `rounding.quantizer`.
    """

    method: str = RTN
    codec: CodecChoice = DEFAULT_CODEC
    solver: str | None = None
    bits_average: float | None = None
    allocation: str = UNIFORM
    bits: tuple[int, ...] = MC_BITS
    router_bits: int | None = None
    reach: float = 0.0
    damp: float = DAMP
    act_order: bool = True
    block: int = BLOCK
    min_tokens: int = MIN_TOKENS
    fallback: str = POOLED
    steps: int = STEPS
    protect: Mapping[int, Collection[int]] = field(default_factory=dict)

    @property
    def at_least(self) -> tuple[int, ...]:
        """Widths that at least one expert of a layer gets: those of MC-MoE's programme."""
        return MC_AT_LEAST if self.bits == MC_BITS else ()

    @property
    def rounding(self) -> RoundingOptions:
        """The options of the rewrite."""
        own = self.method if self.method in (GPTQ, AUTOROUND) else NEAREST
        solver = self.solver or own
        return RoundingOptions(
            self.codec.name,
            self.codec.group_size,
            solver,
            self.reach,
            self.damp,
            self.act_order,
            self.block,
            self.min_tokens,
            self.fallback,
            self.steps,
        )

    @property
    def sets(self) -> tuple[str, ...]:
        """The sets of statistics that it needs (`moekit.profile.SETS`)."""
        found = []
        if self.allocation == MC_MOE:
            found.append("default")
        if self.rounding.solver == GPTQ:
            found.append("full")
        if self._searches or self.rounding.solver == AUTOROUND:
            found.append("inputs")
        return tuple(found)

    @property
    def needs_model(self) -> bool:
        """Whether the plan is made with the weights in memory."""
        return self._searches

    @property
    def _searches(self) -> bool:
        scales = self.method in (AWQ, EAQUANT)
        return scales or self.allocation == MC_MOE or self.router_bits is not None

    def check(self, spec: MoESpec) -> None:
        """Raise `UserError` for what cannot work, before anything is loaded."""
        if self.method not in METHODS:
            raise UserError(f"--method {self.method} is unknown; there are {', '.join(METHODS)}.")
        if self.allocation not in ALLOCATIONS:
            raise UserError(
                f"--allocate {self.allocation} is unknown; there are {', '.join(ALLOCATIONS)}."
            )
        if (self.bits_average is None) != (self.allocation == UNIFORM):
            raise UserError(
                "--bits-avg and --allocate mc-moe go together; for one width for all experts give "
                "--codec alone."
            )
        self._check_widths()
        if self.method == RTN and self.solver not in (None, NEAREST):
            raise UserError("--method rtn rounds to nearest; take --method gptq.")
        self.rounding.check()
        for layer in spec.per_layer:
            if self.bits_average is not None:
                budget_of(self.bits_average, layer.num_experts, self.bits, self.at_least)
            for codec in self._codecs():
                _check_layout(codec, layer.hidden_size, layer.expert_width, layer.layer_index)
        _check_protected(self.protect, spec)

    def _check_widths(self) -> None:
        widths = ", ".join(map(str, self.bits))
        if len(set(self.bits)) != len(self.bits) or len(self.bits) < 2:
            raise UserError(f"--widths are two or more different ones, not {widths}")
        if self.bits_average is None:
            if self.bits != MC_BITS:
                raise UserError("--widths are those that --bits-avg mixes; give both")
        elif not min(self.bits) <= self.bits_average <= max(self.bits):
            raise UserError(
                f"--bits-avg {self.bits_average:g} is no average of {widths} bits; give other "
                "--widths, as --widths 3,4"
            )

    def _codecs(self) -> list[CodecChoice]:
        if self.bits_average is None:
            return [self.codec]
        return [codec_at(b, self.codec) for b in self.bits]


@dataclass
class QuantizePlan:
    """The plan, and what is worth telling of each layer: rows of plain JSON."""

    plan: ExpertPlan
    layers: list[dict[str, Any]]


def plan_quantization(
    request: QuantizeRequest,
    spec: MoESpec,
    stats: ExpertStats | None = None,
    view: MoEView | None = None,
    *,
    stats_path: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> QuantizePlan:
    """The plan that quantizes the experts of a model as `request` says.

    `stats` hold `request.sets`, and `view` is the loaded model where `request.needs_model`;
    `stats_path` is where a plan that is applied later finds the stats. `progress` gets (layers
    done, all). Raises `UserError` for a model that the method cannot treat.
    """
    request.check(spec)
    layers: dict[int, dict[int, Action]] = {}
    values: dict[str, Tensor] = {}
    fit: dict[str, Tensor] = {}
    told = []
    work = _Work(request, stats, view) if request.needs_model else None
    for at, layer in enumerate(spec.per_layer):
        bits = [nominal_bits(request.codec.name)] * layer.num_experts
        row: dict[str, Any] = {"layer": layer.layer_index}
        if work is not None:
            bits = work.bits(at) or bits
        for e in request.protect.get(layer.layer_index, ()):
            bits[e] = PROTECTED_BITS
        if work is not None:
            row |= work.scale(at, bits, values, fit)
        layers[layer.layer_index] = {e: Action(bits=b) for e, b in enumerate(bits)}
        row["bits"] = sum(bits) / len(bits)
        row["experts_at"] = {f"{b:g}": bits.count(b) for b in sorted(set(bits))}
        told.append(row)
        if progress is not None:
            progress(at + 1, len(spec.per_layer))
    options = {k: v for k, v in asdict(request.rounding).items() if _applies(k, request)}
    plan = ExpertPlan(
        layers,
        Fingerprint.of(spec),
        tensors=PlanTensors(values=values, fit=fit),
        fit=Fit(request.method, stats_path, options),
    )
    return QuantizePlan(plan, told)


def _applies(option: str, request: QuantizeRequest) -> bool:
    if option == "solver":
        return request.method in (AWQ, EAQUANT)
    if option in ("codec", "group_size", "reach"):
        return True
    solver = request.rounding.solver
    if option == "min_tokens":
        return solver != NEAREST
    return solver == (AUTOROUND if option == "steps" else GPTQ)


class _Work:
    """What the layers share while a plan is made with the weights in memory."""

    def __init__(
        self, request: QuantizeRequest, stats: ExpertStats | None, view: MoEView | None
    ) -> None:
        if stats is None or view is None:
            raise ValueError(f"{request.method} plans with stats and a loaded model")
        self.request, self.stats, self.view = request, stats, view
        self.tensors = dict(view.model.named_parameters())
        self.scalings: dict[int, InputScaling] = {}
        if request.method in (AWQ, EAQUANT) or request.router_bits:
            model: Any = view.model
            self.scalings = scalings_of(model)

    def bits(self, position: int) -> list[float] | None:
        """Bits by expert of a layer, by the programme; None where all get the same."""
        request = self.request
        if request.bits_average is None:
            return None
        layer = self.view[position]
        experts = layer.num_experts
        codecs = [codec_at(b, request.codec).make() for b in request.bits]
        inputs = BlockInputs.of(self.stats, position)
        errors = rounding_errors(layer, codecs, inputs, reach=request.reach)
        counts = self.stats.counts(position)[:experts].double()
        name = "chosen_softmax_sum" if self.stats.has(position, "chosen_softmax_sum") else None
        # A router without logits shows no probabilities; what it gave the experts stands for them.
        gates = (
            self.stats.by_domain(position, name)[:experts]
            if name
            else self.stats.saliency_sum(position, gate=1)[:experts]
        )
        costs = mc_costs(_shares(counts), _shares(gates), errors)
        budget = budget_of(request.bits_average, experts, request.bits, request.at_least)
        return list(allocate(costs, request.bits, budget, request.at_least))

    def scale(
        self, position: int, bits: list[float], values: dict[str, Tensor], fit: dict[str, Tensor]
    ) -> dict[str, Any]:
        """Search the scales of a layer, put them into `values` and `fit`, and tell of it."""
        request, layer = self.request, self.view[position]
        if not self.scalings:
            return {}
        scaling, told = self.scalings[layer.index], {}
        inputs = BlockInputs.of(self.stats, position)
        scale, middle = None, {}
        if request.method == AWQ:
            codecs = [codec_at(b, request.codec).make() for b in bits]
            some = BlockInputs.of(self.stats, position, SEARCHED_TOKENS)
            found = search_awq(layer, codecs, some)
            scale, middle = found.inputs, found.middle
            told = {"error_before": found.errors[0], "error_after": found.errors[1]}
        elif request.method == EAQUANT:
            experts = [layer.get_expert(e) for e in range(layer.num_experts)]
            peaks = input_peaks(inputs, layer.num_experts)
            router = self._router(layer, scaling)
            scale = shared_scale(peaks, experts, None if router is None else self.tensors[router])
            middle = middle_scales(layer, experts, inputs)
        if scale is not None:
            scale = scaling.exact_scale(scale, self.tensors)
            values |= scaling.norm_values(scale, self.tensors)
            values |= scaling.matrix_values(scale, self.tensors)
            fit[f"inputs.{layer.index}"] = scale
        fit |= {f"middle.{layer.index}.{e}": vector for e, vector in middle.items()}
        told |= {"inputs_scaled": scale is not None, "middles_scaled": len(middle)}
        if request.router_bits:
            told |= self._align(layer, scaling, scale, inputs.hidden, values)
        return told

    def _router(self, layer: MoELayer, scaling: InputScaling) -> str | None:
        """The name of the router's matrix, if it reads what the experts read."""
        weight = layer.router_weight
        names = [name for name in scaling.matrices if self.tensors[name] is weight]
        return names[0] if names else None

    def _align(
        self,
        layer: MoELayer,
        scaling: InputScaling,
        scale: Tensor | None,
        hidden: Tensor,
        values: dict[str, Tensor],
    ) -> dict[str, Any]:
        name = self._router(layer, scaling)
        if name is None or self.request.router_bits is None:
            raise UserError(
                f"{layer.name}: the router does not read what the experts read, so it cannot be "
                "rounded; leave out --router-bits."
            )
        weight = values.get(name, self.tensors[name]).detach()
        seen = hidden if scale is None else hidden / scale
        bias = layer.router_bias
        made = align_router(
            weight,
            seen,
            layer.top_k,
            bias=None if bias is None else bias.detach().float(),
            bits=self.request.router_bits,
        )
        values[name] = made.weight.to(weight.dtype)
        return {"router_ratio": made.ratio, "router_divergence": made.divergence}


def _shares(values: Tensor) -> Tensor:
    return values.double() / values.double().sum().clamp(min=torch.finfo(torch.float64).tiny)


def _check_layout(codec: CodecChoice, hidden: int, width: int, layer: int) -> None:
    for shape in ((width, hidden), (hidden, width)):
        try:
            codec.make().layout(shape)
        except UserError as error:
            raise UserError(f"layer {layer}: {error}") from None


def _check_protected(protect: Mapping[int, Collection[int]], spec: MoESpec) -> None:
    known = {layer.layer_index: layer.num_experts for layer in spec.per_layer}
    for layer, experts in protect.items():
        wrong = [e for e in experts if not 0 <= e < known.get(layer, 0)]
        if wrong:
            raise UserError(f"--protect: layer {layer} has no expert {wrong[0]}.")
