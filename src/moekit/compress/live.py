"""A plan on a loaded model, for as long as a context lasts: for searches, probes and tests.

The model behaves as the written and reloaded one: dropped experts are never chosen, folded and
rewritten ones have their new values. Nothing is written, and the model is afterwards as it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from moekit.core.apply_plan import decoder_layer
from moekit.core.architecture import meta_model
from moekit.core.codec_choice import DEFAULT_CODEC, codec_at
from moekit.core.expert_source import bank_names
from moekit.core.find import find_moe
from moekit.core.layer import MoELayer
from moekit.core.layout import ExpertAxis, expert_axes, layer_of, with_num_experts
from moekit.core.new_experts import NewExperts, decode_expert, pad_width, width_of
from moekit.core.packed import CodecChoice
from moekit.core.plan import ExpertPlan
from moekit.core.plan_compose import router_matrix
from moekit.core.rewrite import Rewrite, changes_others
from moekit.core.router_edit import mix_entries
from moekit.core.spec import MoESpec, spec_of
from moekit.core.view import MoEView


@contextmanager
def apply_live(
    view: MoEView,
    plan: ExpertPlan,
    rewrite: Rewrite | None = None,
    codec: CodecChoice = DEFAULT_CODEC,
) -> Iterator[None]:
    """Let the loaded model behave as if `plan` had been written and the result loaded.

    Copies of the experts and small tensors that change are kept to restore them. Raises
    `UserError` for a plan that does not fit the model.
    """
    spec = spec_of(view.model)  # type: ignore[arg-type]
    plan.validate(spec)
    experts_of = NewExperts(plan, rewrite, lambda bits: codec_at(bits, codec).make())
    for described in spec.per_layer:
        index = described.layer_index
        experts_of.check_bits(described, plan.survivors(index, described.num_experts))
    with ExitStack() as stack, torch.no_grad():
        for layer in view:
            _change_experts(stack, layer, plan, experts_of)
        _change_router(stack, view, spec, plan)
        if rewrite is not None and changes_others(rewrite):
            _change_others(stack, view.model, spec, rewrite)
        for name, value in plan.tensors.values.items():
            _set(stack, view.model.get_parameter(name), value)
        gone = {layer.position: _gone(plan, layer) for layer in view}
        if any(gone.values()):
            stack.enter_context(view.ban_experts(gone))
        with torch.enable_grad():
            yield


def _gone(plan: ExpertPlan, layer: MoELayer) -> list[int]:
    """The experts whose router row no longer exists."""
    if plan.router(layer.index) == "alias":
        return plan.dropped(layer.index)
    kept = set(plan.survivors(layer.index, layer.num_experts))
    return [e for e in range(layer.num_experts) if e not in kept]


def _change_experts(
    stack: ExitStack, layer: MoELayer, plan: ExpertPlan, experts_of: NewExperts
) -> None:
    survivors = plan.survivors(layer.index, layer.num_experts)
    if experts_of.unchanged(layer.index, survivors):
        return
    # A member must not be read after it was replaced.
    before = {e: layer.get_expert(e) for e in range(layer.num_experts)}
    for expert, old in before.items():
        stack.callback(layer.set_expert, expert, old)
    folded = plan.groups(layer.index)
    for expert in survivors:
        made = experts_of(layer.index, expert, before.__getitem__)
        made = decode_expert(made, before[expert].down.dtype)
        made = pad_width(made, width_of(before[expert]))
        for member in folded.get(expert, {expert: 1.0}):
            layer.set_expert(member, made)


def _change_router(stack: ExitStack, view: MoEView, spec: MoESpec, plan: ExpertPlan) -> None:
    """Put the edited entries into the places of the survivors."""
    edited = {
        layer.index: layer
        for layer in view
        if plan.router(layer.index) == "linear"
        or (plan.router(layer.index) == "mean" and plan.groups(layer.index))
    }
    if not edited:
        return
    state = view.model.state_dict(keep_vars=True)
    paths = {layer.path: layer.layer_index for layer in spec.per_layer}
    for name, axis in _router_axes(view.model, spec).items():
        layer = edited.get(layer_of(name, paths) or 0)
        if layer is None or layer_of(name, paths) not in edited:
            continue
        tensor = state[name]
        survivors = plan.survivors(layer.index, layer.num_experts)
        matrix = router_matrix(plan, layer.index, layer.num_experts)
        mixed = mix_entries(matrix, tensor.detach(), axis, layer.num_experts)
        new = tensor.detach().clone().movedim(axis.axis, 0)
        rows = [e * axis.block + i for e in survivors for i in range(axis.block)]
        new[rows] = mixed.movedim(axis.axis, 0)[: len(rows)]
        _set(stack, tensor, new.movedim(0, axis.axis))


def _router_axes(model: nn.Module, spec: MoESpec) -> dict[str, ExpertAxis]:
    """The tensors with an entry for each expert, but for the experts themselves."""
    config = model.config
    other = with_num_experts(config, 2 * spec.num_experts)  # type: ignore[arg-type]
    banks = {full for site in find_moe(model) for _, full in bank_names(site)}
    axes = expert_axes(meta_model(config), meta_model(other))  # type: ignore[arg-type]
    return {name: axis for name, axis in axes.items() if name not in banks}


def _change_others(stack: ExitStack, model: nn.Module, spec: MoESpec, rewrite: Rewrite) -> None:
    banks = {full for site in find_moe(model) for _, full in bank_names(site)}
    prefixes = tuple({decoder_layer(layer.path) for layer in spec.per_layer})
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name.startswith(prefixes) and name not in banks:
            _set(stack, tensor, rewrite.other(name, tensor.detach().clone()))


def _set(stack: ExitStack, tensor: Tensor, values: Tensor) -> None:
    """Overwrite a tensor of the model until the context ends."""
    stack.callback(_copy, tensor, tensor.detach().clone())
    _copy(tensor, values)


def _copy(tensor: Tensor, values: Tensor) -> None:
    with torch.no_grad():
        tensor.copy_(values)
