"""Router edits on the tensors that have an entry for each expert: rows, biases, scales.

Shapes: E experts before, r after; a tensor has E entries (and perhaps more, which belong to no
expert) on one axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moekit.core.deferred import Deferred
from moekit.core.layout import ExpertAxis
from moekit.core.plan import ExpertPlan
from moekit.core.plan_compose import router_matrix

# Below every score or logit, and within float16. Finite, since groups are ranked by sums.
BARRED = -1e4


def router_slots(plan: ExpertPlan, layer: int, num_experts: int) -> list[int]:
    """For each expert that the edited router chooses among, the original id it leads to.

    Of an alias table the entries that lead to one expert repeat its id; else all differ.
    """
    survivors = plan.survivors(layer, num_experts)
    if plan.router(layer) != "alias":
        return survivors
    leader = {m: e for e, members in plan.groups(layer).items() for m in members}
    dropped = set(plan.dropped(layer))
    return [leader.get(e, e) for e in range(num_experts) if e not in dropped]


def edit_router_tensor(
    plan: ExpertPlan, layer: int, num_experts: int, axis: ExpertAxis, tensor: Deferred
) -> Deferred:
    """A tensor with one entry an expert, after the edit of the layer's router."""
    kind = plan.router(layer)
    size = tensor.shape[axis.axis]
    if kind in ("slice", "alias"):
        kept = plan.survivors(layer, num_experts)
        if kind == "alias":
            dropped = set(plan.dropped(layer))
            kept = [e for e in range(num_experts) if e not in dropped]
        entries = axis.entries(kept, num_experts, size)
        if entries == list(range(size)):
            return tensor
        selected: Any = tensor.index_select(axis.axis, torch.tensor(entries))
        return selected
    matrix = router_matrix(plan, layer, num_experts)
    shape = list(tensor.shape)
    shape[axis.axis] += (len(matrix) - num_experts) * axis.block

    def read(region: Any) -> Tensor:
        mixed = mix_entries(matrix, tensor.read(), axis, num_experts)
        return mixed[tuple(slice(a, b) for a, b in region)]

    return Deferred(tuple(shape), tensor.dtype, read)


def with_dead_entries(
    name: str, tensor: Deferred, axis: ExpertAxis, slots: Sequence[int | None]
) -> Deferred:
    """A tensor of the router with entries for dead experts (None in `slots`) between those of the
    living: zeros, and in a bias a value that keeps them from being chosen."""
    if None not in slots:
        return tensor
    fill = BARRED if name.rpartition(".")[2].endswith(("bias", "biases")) else 0.0
    living = sum(slot is not None for slot in slots)
    shape = list(tensor.shape)
    shape[axis.axis] += (len(slots) - living) * axis.block

    def read(region: Any) -> Tensor:
        moved = tensor.read().movedim(axis.axis, 0)
        own, rest = moved[: living * axis.block], moved[living * axis.block :]
        padded = own.new_full((len(slots) * axis.block, *own.shape[1:]), fill)
        places = [i for i, slot in enumerate(slots) if slot is not None]
        padded[[i * axis.block + j for i in places for j in range(axis.block)]] = own
        whole = torch.cat([padded, rest]).movedim(0, axis.axis)
        return whole[tuple(slice(a, b) for a, b in region)]

    return Deferred(tuple(shape), tensor.dtype, read)


def mix_entries(matrix: Tensor, values: Tensor, axis: ExpertAxis, num_experts: int) -> Tensor:
    """Mix the experts' entries of `values` by `matrix` [r, E]; what belongs to no expert stays.

    Rows of the matrix with a single 1 copy their entry exactly.
    """
    moved = values.movedim(axis.axis, 0)
    own, rest = moved[: num_experts * axis.block], moved[num_experts * axis.block :]
    flat = own.reshape(num_experts, -1).double()
    mixed = (matrix.to(flat.device) @ flat).to(values.dtype)
    mixed = mixed.view(len(matrix) * axis.block, *moved.shape[1:])
    return torch.cat([mixed, rest]).movedim(0, axis.axis)
