"""The experts of a plan's result, computed one at a time from the originals.

Shapes: D width, F expert width, n neurons of an expert that stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from moekit.core.errors import UserError
from moekit.core.expert_weights import ExpertWeights
from moekit.core.layer_spec import LayerSpec
from moekit.core.plan import ExpertPlan
from moekit.core.rewrite import EncodedExpert, Read, Rewrite
from moekit.ops.codecs import Codec

CodecAt = Callable[[float], Codec]
MATRICES = ("gate", "up", "down")
# The axis of an expert's tensors along which its neurons lie.
NEURON_AXIS = {"gate": 0, "up": 0, "down": 1, "gate_bias": 0, "up_bias": 0}


class NewExperts:
    """Computes the resulting experts of `plan`, by `rewrite` where there is one.

    Without a rewrite the members of a group are summed with their weights, the result is cut to its
    width, replaced by the truncated SVD of each matrix at its rank, and encoded by the codec that
    `codec_at` gives for its bits.
    """

    def __init__(self, plan: ExpertPlan, rewrite: Rewrite | None, codec_at: CodecAt) -> None:
        self._plan = plan
        self._rewrite = rewrite
        self._codec_at = codec_at

    def unchanged(self, layer: int, experts: list[int]) -> bool:
        """Whether every one of the surviving `experts` of a layer keeps its values."""
        if self._rewrite is not None:
            return False
        orders = self._plan.tensors.neurons
        for expert in experts:
            action = self._plan.action(layer, expert)
            edits = (action.group, action.bits, action.rank, action.width)
            if any(edit is not None for edit in edits) or (layer, expert) in orders:
                return False
        return True

    def check_bits(self, layer: LayerSpec, experts: list[int]) -> None:
        """Raise `UserError` for bits that no codec has, or that do not fit the matrices."""
        index = layer.layer_index
        for expert in experts:
            bits = self._plan.action(index, expert).bits
            if bits is None or self._rewrite is not None:
                continue
            codec = self._codec_at(bits)
            width = resulting_width(self._plan, index, expert, layer.expert_width)
            for shape in ((width, layer.hidden_size), (layer.hidden_size, width)):
                try:
                    codec.layout(shape)
                except UserError as error:
                    raise UserError(f"layer {index}, expert {expert}: {error}") from None

    def __call__(self, layer: int, expert: int, read: Read) -> ExpertWeights | EncodedExpert:
        """The resulting expert that survives under the original id `expert`."""
        made, bits = self.unrounded(layer, expert, read), self._plan.action(layer, expert).bits
        if bits is None or not isinstance(made, ExpertWeights) or self._rewrite is not None:
            return made
        return encode_expert(made, self._codec_at(bits))

    def unrounded(self, layer: int, expert: int, read: Read) -> ExpertWeights | EncodedExpert:
        """The same before its bits: for a target that encodes experts as the plan says itself."""
        action = self._plan.action(layer, expert)
        members = self._plan.groups(layer).get(expert, {expert: 1.0})

        def read_ordered(member: int) -> ExpertWeights:
            order = self._plan.tensors.neurons.get((layer, member))
            made = read(member)
            return made if order is None else select_neurons(made, order)

        if self._rewrite is not None:
            return self._rewrite.expert(layer, expert, members, read_ordered)
        made = fold(members, read_ordered)
        if action.width is not None:
            made = select_neurons(made, torch.arange(action.width))
        if action.rank is not None:
            made = truncate_rank(made, action.rank)
        return made


def fold(members: Mapping[int, float], read: Read) -> ExpertWeights:
    """The sum of experts times their weights, in float32; one of weight 1 stays as it is."""
    if list(members.values()) == [1.0]:
        return read(next(iter(members)))
    total: dict[str, Tensor] = {}
    dtypes = {}
    for member, weight in members.items():
        for name, part in read(member).tensors().items():
            dtypes[name] = part.dtype
            scaled = part.float() * weight
            total[name] = scaled if name not in total else total[name].add_(scaled)
    rounded = {name: part.to(dtypes[name]) for name, part in total.items()}
    return expert_of(rounded)


def expert_of(parts: Mapping[str, Tensor]) -> ExpertWeights:
    """The expert with these parts by name; what is not there is None."""
    return ExpertWeights(
        parts.get("gate"),
        parts.get("up"),
        parts["down"],
        parts.get("gate_bias"),
        parts.get("up_bias"),
        parts.get("down_bias"),
    )


def select_neurons(expert: ExpertWeights, order: Tensor) -> ExpertWeights:
    """The expert with the neurons `order` [n] only, in that order."""
    parts = {
        name: part.index_select(NEURON_AXIS[name], order) if name in NEURON_AXIS else part
        for name, part in expert.tensors().items()
    }
    return expert_of(parts)


def pad_width(expert: ExpertWeights, width: int) -> ExpertWeights:
    """The expert with neurons of zeros up to `width`: they add nothing to its output."""
    parts = {}
    for name, part in expert.tensors().items():
        axis = NEURON_AXIS.get(name)
        if axis is not None and part.shape[axis] < width:
            missing = list(part.shape)
            missing[axis] = width - part.shape[axis]
            part = torch.cat([part, part.new_zeros(missing)], dim=axis)
        parts[name] = part
    return expert_of(parts)


def truncate_rank(expert: ExpertWeights, rank: int) -> ExpertWeights:
    """The expert with each matrix replaced by its best approximation of rank `rank`."""
    parts = expert.tensors()
    for name in MATRICES:
        if name in parts and rank < min(parts[name].shape):
            matrix = parts[name]
            left, values, right = torch.linalg.svd(matrix.float(), full_matrices=False)
            low = (left[:, :rank] * values[:rank]) @ right[:rank]
            parts[name] = low.to(matrix.dtype)
    return expert_of(parts)


def encode_expert(expert: ExpertWeights, codec: Codec) -> EncodedExpert:
    """The expert with its matrices encoded, rounding to nearest."""
    parts = expert.tensors()
    matrices = {name: codec.encode(parts[name]) for name in MATRICES if name in parts}
    vectors = {name: part for name, part in parts.items() if name not in MATRICES}
    return EncodedExpert(codec, matrices, vectors)


def decode_expert(expert: ExpertWeights | EncodedExpert, dtype: torch.dtype) -> ExpertWeights:
    """The expert with dense matrices of `dtype`."""
    if isinstance(expert, ExpertWeights):
        parts = {name: part.to(dtype) for name, part in expert.tensors().items()}
    else:
        decoded = {n: expert.codec.decode(m).to(dtype) for n, m in expert.matrices.items()}
        parts = {**decoded, **expert.vectors}
    return expert_of(parts)


def width_of(expert: ExpertWeights) -> int:
    """F, the number of neurons."""
    return expert.down.shape[1]


def resulting_width(plan: ExpertPlan, layer: int, expert: int, width: int) -> int:
    """The width that the plan gives a surviving expert of a layer of width `width`.

    Raises `UserError` where the members of a group keep different numbers of neurons.
    """
    members = plan.groups(layer).get(expert, {expert: 1.0})
    orders = [plan.tensors.neurons.get((layer, member)) for member in members]
    kept = [width if order is None else len(order) for order in orders]
    if len(set(kept)) > 1:
        raise UserError(
            f"Layer {layer}: experts {sorted(members)} are folded into one but keep {kept} "
            "neurons; they need the same number."
        )
    return min(kept[0], plan.action(layer, expert).width or kept[0])
