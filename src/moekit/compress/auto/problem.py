"""The model as the search sees it: what a combination of steps is, takes and costs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moekit.compress.auto.search import Choice, Combination
from moekit.compress.condense.condense import condense_plan
from moekit.compress.condense.methods import recipe_of
from moekit.compress.condense.model_experts import ModelExperts
from moekit.compress.fitted import rewrite_of
from moekit.compress.live import apply_live
from moekit.compress.prune.planning import prune
from moekit.compress.quantize.planning import QuantizeRequest, plan_quantization
from moekit.compress.request import experts_per_layer, least_experts
from moekit.core.codec_choice import codec_at
from moekit.core.errors import UserError
from moekit.core.packed import CodecChoice
from moekit.core.plan import Action, ExpertPlan, Fingerprint
from moekit.core.rewrite import Rewrite
from moekit.core.spec import LayerSpec, MoESpec
from moekit.core.stats import ExpertStats
from moekit.core.view import MoEView

EXPERTS, BITS = "experts", "bits"
PRUNE = ("reap", "man")
CONDENSE = ("hc-smoe",)
SHARES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75)
WIDTHS = (8.0, 4.0, 3.0, 2.0)
# Mixes of the two widths beside them.
AVERAGES = (3.5, 2.5, 2.25)
RTN, GPTQ, MC = "rtn", "gptq", "mc-moe"
RESIDENT_BYTES = 2


@dataclass(frozen=True)
class Made:
    """A combination as a plan, the rewrite that computes its values, and the codec of the rest."""

    plan: ExpertPlan
    rewrite: Rewrite | None
    codec: CodecChoice


@dataclass
class CompressionProblem:
    """Combinations of removing or merging experts with fewer bits a weight.

    `stats` hold the sets `SETS`; `loss` measures the mean bits per byte of the probe text under the
    model as it is; `codec` is the kind of codec (its bits are a choice). `accept` leaves out
    combinations, for reasons of its own.
    """

    view: MoEView
    spec: MoESpec
    stats: ExpertStats
    source: Path
    loss: Callable[[], float]
    codec: CodecChoice
    protect: Mapping[int, Collection[int]] = field(default_factory=dict)
    seed: int = 0
    accept: Callable[[Combination], bool] | None = None

    SETS = ("default", "full", "inputs", "outputs")

    def __post_init__(self) -> None:
        self._made: dict[Combination, Made] = {}
        self._bits: dict[Choice, ExpertPlan] = {}
        self.unchanged_loss = self.loss()

    @property
    def resident_bytes(self) -> int:
        """All but the routed experts, in 16 bits."""
        routed = sum(layer.num_experts * layer.params_per_expert for layer in self.spec.per_layer)
        return (self.spec.total_params - routed) * RESIDENT_BYTES

    def choices(self) -> dict[str, list[Choice]]:
        """The steps that this model allows, by kind."""
        experts = []
        for name in (*PRUNE, *CONDENSE):
            for share in SHARES:
                keep = _whole(self.spec, share)
                if keep is not None:
                    experts.append(Choice(EXPERTS, name, share))
        bits = [Choice(BITS, name, width) for name in (RTN, GPTQ) for width in WIDTHS]
        bits += [Choice(BITS, MC, average) for average in AVERAGES]
        return {EXPERTS: experts, BITS: bits}

    def allows(self, combination: Combination) -> bool:
        """Merged experts are rounded to nearest: what fits values was profiled on the originals."""
        names = {choice.name for choice in combination}
        if names & set(CONDENSE) and names & {GPTQ, MC}:
            return False
        return self.accept is None or self.accept(combination)

    def size(self, combination: Combination) -> int:
        """Bytes of the packed model: all but the routed experts in 16 bits, they by their codec."""
        return self.resident_bytes + sum(self._expert_bytes(combination))

    def mean_expert_bytes(self, combination: Combination) -> float:
        """Bytes of one routed expert after `combination`, on average."""
        each = self._expert_bytes(combination)
        return sum(each) / len(each)

    def _expert_bytes(self, combination: Combination) -> list[int]:
        plan = self.made(combination).plan
        found = []
        for layer in self.spec.per_layer:
            index = layer.layer_index
            for expert in plan.survivors(index, layer.num_experts):
                bits = plan.action(index, expert).bits
                found.append(
                    expert_bytes(layer, codec_at(16 if bits is None else bits, self.codec))
                )
        return found

    def increase(self, combination: Combination) -> float:
        """Bits per byte of the probe text above those of the unchanged model."""
        made = self.made(combination)
        with apply_live(self.view, made.plan, made.rewrite, made.codec):
            return self.loss() - self.unchanged_loss

    def made(self, combination: Combination) -> Made:
        """The plan of a combination."""
        if combination not in self._made:
            self._made[combination] = self._make(combination)
        return self._made[combination]

    def _make(self, combination: Combination) -> Made:
        steps = {choice.kind: choice for choice in combination}
        plan = ExpertPlan(model=Fingerprint.of(self.spec))
        if EXPERTS in steps:
            plan = self._reduced(steps[EXPERTS])
        if BITS not in steps:
            return Made(plan, rewrite_of(plan, self.source, self.stats), self.codec)
        rounded = self._rounded(steps[BITS])
        plan = with_bits(plan, rounded, self.spec)
        rewrite = None
        if plan.fit is not None:
            rewrite = rewrite_of(plan, self.source, self.stats)
        return Made(plan, rewrite, self.codec)

    def _reduced(self, choice: Choice) -> ExpertPlan:
        keep = experts_per_layer(self.spec, ratio=choice.level)
        if choice.name in CONDENSE:
            return condense_plan(
                self.spec,
                self.stats,
                ModelExperts.of_view(self.view),
                keep,
                recipe_of(choice.name),
                seed=self.seed,
                protect=self.protect,
            )
        return prune(self.spec, self.stats, choice.name, keep, protect=self.protect)

    def _rounded(self, choice: Choice) -> ExpertPlan:
        if choice not in self._bits:
            request = self._request(choice)
            made = plan_quantization(request, self.spec, self.stats, self.view)
            self._bits[choice] = made.plan
        return self._bits[choice]

    def _request(self, choice: Choice) -> QuantizeRequest:
        common: dict[str, Any] = {"protect": self.protect, "method": GPTQ}
        if choice.name == MC:
            common |= {"bits_average": choice.level, "allocation": "mc-moe"}
            widths = math.floor(choice.level), math.ceil(choice.level)
            return QuantizeRequest(codec=self.codec, bits=widths, **common)
        if choice.name == RTN:
            common["method"] = RTN
        return QuantizeRequest(codec=codec_at(choice.level, self.codec), **common)


def with_bits(plan: ExpertPlan, rounded: ExpertPlan, spec: MoESpec) -> ExpertPlan:
    """`plan` with the bits that `rounded` gives its survivors, by their original ids.

    Folded experts are rounded to nearest: their fit could not be that of the originals.
    """
    layers: dict[int, dict[int, Action]] = {}
    for layer in spec.per_layer:
        index = layer.layer_index
        actions = dict(plan.layers.get(index, {}))
        for expert in plan.survivors(index, layer.num_experts):
            before = actions.get(expert, Action())
            bits = rounded.action(index, expert).bits
            actions[expert] = dataclasses.replace(before, bits=bits)
        layers[index] = actions
    fit = None if "group" in plan.uses() else rounded.fit
    return dataclasses.replace(plan, layers=layers, fit=fit)


def expert_bytes(layer: LayerSpec, codec: CodecChoice) -> int:
    """Bytes of one expert of a layer in a codec."""
    made = codec.make()
    matrices = [(layer.expert_width, layer.hidden_size), (layer.hidden_size, layer.expert_width)]
    weights = sum(rows * columns for rows, columns in matrices)
    if layer.params_per_expert > 1.25 * weights:
        # A gate as large as up; biases are too small to be mistaken for one.
        matrices.append(matrices[0])
    biases = layer.params_per_expert - sum(rows * columns for rows, columns in matrices)
    return sum(made.nbytes(shape) for shape in matrices) + 2 * max(biases, 0)


def _whole(spec: MoESpec, share: float) -> dict[int, int] | None:
    try:
        keep = experts_per_layer(spec, ratio=share)
    except UserError:
        return None
    least = {layer.layer_index: least_experts(layer) for layer in spec.per_layer}
    return keep if all(keep[index] >= least[index] for index in keep) else None
