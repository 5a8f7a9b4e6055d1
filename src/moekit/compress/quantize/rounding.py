"""The values of quantized experts, computed one expert at a time while a model is written.

One kernel: scale the channels as the plan says, then round to nearest or by GPTQ, in the codec of
the bits that the plan gives the expert. The methods are settings of it; what differs between them
before that (scales, bits) is in the plan. Shapes: O rows, I columns, D width, F expert width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moekit.compress.quantize.autoround import autoround
from moekit.compress.quantize.expert_moments import ExpertMoments, ExpertSamples
from moekit.compress.quantize.expert_scaling import ChannelScales
from moekit.core.codec_choice import codec_at
from moekit.core.errors import UserError
from moekit.core.expert_weights import ExpertWeights
from moekit.core.packed import CodecChoice
from moekit.core.plan import ExpertPlan
from moekit.core.rewrite import EncodedExpert, Read, Rewrite
from moekit.core.stats import ExpertStats
from moekit.ops.codecs import Codec, Encoded
from moekit.ops.codecs.groups import GroupCodec
from moekit.ops.codecs.plain import PlainCodec
from moekit.ops.codecs.range_search import searched_encode
from moekit.ops.gptq import gptq_encode

NEAREST, GPTQ, AUTOROUND = SOLVERS = ("nearest", "gptq", "autoround")
POOLED = "pooled"
FALLBACKS = (POOLED, NEAREST)
MIN_TOKENS = 32
# Moments of experts that are computed at once.
BATCH_BYTES = 256 * 2**20
# Edits of an expert after which the moments of its inputs are no longer those that were collected.
_MOVED = ("group", "width", "rank")


@dataclass(frozen=True)
class Fallback:
    """An expert with fewer tokens than asked for: its decoder layer, id, tokens and what was done
    instead of GPTQ on its own inputs."""

    layer: int
    expert: int
    tokens: int
    done: str


class RoundedExperts(Rewrite):
    """A rewrite that rounds experts; see `quantizer` for its options.

    `fallbacks` lists the experts with too few tokens.
    """

    def __init__(
        self,
        plan: ExpertPlan,
        stats: ExpertStats | None,
        options: RoundingOptions,
        model: Path | None = None,
    ) -> None:
        options.check()
        edits = [name for name in _MOVED if name in plan.uses()]
        if (edits and options.solver == GPTQ) or plan.tensors.neurons:
            raise UserError(
                f"The plan also has {', '.join(edits) or 'neuron orders'}, after which the inputs "
                "that were profiled are not those of the experts. Apply it first, profile the "
                "result and quantize that."
            )
        self._kind = self.codec = CodecChoice(options.codec, options.group_size)
        self.options = options
        self.identity: Mapping[str, Any] = {
            **asdict(options),
            "stats": None if stats is None else stats.digest(),
        }
        self._plan = plan
        self._moments = None if stats is None else ExpertMoments(stats)
        if options.solver == GPTQ and self._moments is None:
            raise UserError("gptq needs stats with the set full: give --stats or --data.")
        self._sample = None
        if options.solver == AUTOROUND:
            if stats is None or model is None:
                raise UserError(
                    "autoround needs stats with the set inputs: give --stats or --data."
                )
            self._sample = ExpertSamples(stats, model)
        self.fallbacks = self._find_fallbacks()
        self._short = {(found.layer, found.expert) for found in self.fallbacks}
        self._made: dict[tuple[int, int], EncodedExpert] = {}

    def expert(
        self, layer: int, expert: int, members: Mapping[int, float], read: Read
    ) -> EncodedExpert:
        if len(members) > 1:
            raise UserError(
                f"Layer {layer}: experts {sorted(members)} are folded into one. Apply that plan "
                "first, then quantize the result."
            )
        if (layer, expert) not in self._made:
            self._made = {
                (layer, each): made
                for each, made in self._batch(layer, self._alike(layer, expert), read).items()
            }
        return self._made[layer, expert]

    def _alike(self, layer: int, expert: int) -> list[int]:
        """The expert and those after it that are computed along with it: of one codec, and all
        with moments of their own, as many as `BATCH_BYTES` allow."""
        found = [expert]
        if self.options.solver != GPTQ or self._falls_back(layer, expert):
            return found
        assert self._moments is not None
        most = max(1, BATCH_BYTES // self._moments.bytes_per_expert(layer))
        for other in range(expert + 1, self._moments.num_experts(layer)):
            if len(found) == most:
                break
            gone = self._plan.action(layer, other).drop or self._falls_back(layer, other)
            if not gone and self._codec(layer, other) == self._codec(layer, expert):
                found.append(other)
        return found

    def _codec(self, layer: int, expert: int) -> CodecChoice:
        bits = self._plan.action(layer, expert).bits
        return self._kind if bits is None else codec_at(bits, self._kind)

    def _batch(self, layer: int, experts: list[int], read: Read) -> dict[int, EncodedExpert]:
        """Some experts of one codec."""
        codec = self._codec(layer, experts[0]).make()
        if self._sample is not None and isinstance(codec, GroupCodec):
            return {e: self._learn(codec, layer, e, read(e)) for e in experts}
        scales = [self.scales(layer, e) for e in experts]
        originals = [read(e) for e in experts]
        scaled = [s.apply(x) for s, x in zip(scales, originals, strict=True)]
        parts = [x.tensors() for x in scaled]
        readers = [name for name in ("gate", "up") if name in parts[0]]
        moments = [self._hessians(codec, layer, e) for e in experts]
        inputs = [_rescaled(m[0], s.inputs) for m, s in zip(moments, scales, strict=True)]
        middle = [_rescaled(m[1], s.middle) for m, s in zip(moments, scales, strict=True)]
        # Gate and up read the same inputs, so their rows are one matrix.
        both = self._round(codec, [torch.cat([p[name] for name in readers]) for p in parts], inputs)
        down = self._round(codec, [p["down"] for p in parts], middle)
        made = {}
        for at, e in enumerate(experts):
            matrices: dict[str, Encoded] = {}
            start = 0
            for name in readers:
                rows = len(parts[at][name])
                matrices[name] = _rows(both[at], start, start + rows)
                start += rows
            matrices["down"] = down[at]
            vectors = {
                name: part.to(getattr(originals[at], name).dtype)
                for name, part in parts[at].items()
                if name not in matrices
            }
            made[e] = EncodedExpert(codec, matrices, vectors)
        return made

    def scales(self, layer: int, expert: int) -> ChannelScales:
        """The scales that the plan has for an expert of a decoder layer."""
        held = self._plan.tensors.fit
        return ChannelScales(held.get(f"inputs.{layer}"), held.get(f"middle.{layer}.{expert}"))

    def _learn(
        self, codec: GroupCodec, layer: int, expert: int, original: ExpertWeights
    ) -> EncodedExpert:
        """One expert by AutoRound, rounded to nearest where it has too few tokens."""
        assert self._sample is not None
        scales = self.scales(layer, expert)
        scaled = scales.apply(original)
        steps = 0 if self._falls_back(layer, expert) else self.options.steps
        place, hidden, gates = self._sample.of_expert(layer, expert)
        if scales.inputs is not None:
            hidden = hidden / scales.inputs
        matrices = autoround(place, scaled, codec, hidden, gates, steps=steps)
        vectors = {
            name: part.to(getattr(original, name).dtype)
            for name, part in scaled.tensors().items()
            if name not in matrices
        }
        return EncodedExpert(codec, matrices, vectors)

    def _round(
        self, codec: Codec, weights: list[Tensor], hessians: list[Tensor | None]
    ) -> list[Encoded]:
        options = self.options
        known = [hessian for hessian in hessians if hessian is not None]
        if len(known) < len(weights):
            return [searched_encode(codec, weight, options.reach) for weight in weights]
        return gptq_encode(
            torch.stack(weights),
            torch.stack(known),
            codec,
            damp=options.damp,
            act_order=options.act_order,
            block=options.block,
            reach=options.reach,
        )

    def _falls_back(self, layer: int, expert: int) -> bool:
        return (layer, expert) in self._short

    def _hessians(
        self, codec: Codec, layer: int, expert: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """The moments of an expert's input and middle; None for rounding to nearest."""
        if self.options.solver != GPTQ or isinstance(codec, PlainCodec):
            return None, None
        assert self._moments is not None
        if not self._falls_back(layer, expert):
            return self._moments.input(layer, expert), self._moments.middle(layer, expert)
        # The neurons of experts differ, so there is nothing to pool for the middle.
        pooled = self.options.fallback == POOLED
        return (self._moments.pooled_input(layer) if pooled else None), None

    def _find_fallbacks(self) -> list[Fallback]:
        source = self._sample if self.options.solver == AUTOROUND else self._moments
        if self.options.solver == NEAREST or source is None:
            return []
        pooled = self.options.fallback == POOLED and self.options.solver == GPTQ
        done = "gptq on the inputs of all experts" if pooled else "rounded to nearest"
        least = max(1, self.options.min_tokens)
        return [
            Fallback(layer, expert, tokens, done)
            for layer, expert, tokens in source.counts()
            if tokens < least and not self._plan.action(layer, expert).drop
        ]


@dataclass(frozen=True)
class RoundingOptions:
    """The options of `quantizer`."""

    codec: str
    group_size: int
    solver: str
    reach: float
    damp: float
    act_order: bool
    block: int
    min_tokens: int
    fallback: str
    steps: int

    def check(self) -> None:
        """Raise `UserError` for values that mean nothing."""
        CodecChoice(self.codec, self.group_size).make()
        for name, value, known in (
            ("solver", self.solver, SOLVERS),
            ("fallback", self.fallback, FALLBACKS),
        ):
            if value not in known:
                raise UserError(f"--{name} {value} is unknown; there are {' and '.join(known)}.")
        for name, number, low, high in (
            ("reach", self.reach, 0.0, 0.95),
            ("damp", self.damp, 0.0, 10.0),
        ):
            if not low <= number <= high:
                raise UserError(f"--{name} {number:g} must lie between {low:g} and {high:g}.")
        if self.block < 1 or self.min_tokens < 0 or self.steps < 0:
            raise UserError("block must be at least 1, min_tokens and steps at least 0.")
        made = CodecChoice(self.codec, self.group_size).make()
        if self.solver == AUTOROUND and not isinstance(made, GroupCodec | PlainCodec):
            raise UserError(f"autoround learns grids of integers; --codec {self.codec} has none.")


def _rescaled(hessian: Tensor | None, scale: Tensor | None) -> Tensor | None:
    """The moment of inputs that were divided by `scale` [I]."""
    if hessian is None or scale is None:
        return hessian
    return hessian / (scale[:, None] * scale[None, :])


def _rows(encoded: Encoded, start: int, stop: int) -> Encoded:
    """Some rows of an encoded matrix: rows are the first axis of every array."""
    planes = tuple(
        {name: array[start:stop].contiguous() for name, array in plane.items()}
        for plane in encoded.planes
    )
    return Encoded((stop - start, encoded.shape[1]), planes)
