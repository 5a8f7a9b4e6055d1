"""Which parts of a model do not learn, from the start or from some step on."""

from collections.abc import Iterable

from torch import nn

from moekit.core.errors import UserError
from moekit.core.find import find_moe
from moekit.layers import MoekitForCausalLM

from .recipe import PARTS


def parts_of(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The parameters of every part in `PARTS`; what belongs to none (dense MLPs) is left out."""
    found: dict[str, dict[int, nn.Parameter]] = {part: {} for part in PARTS}

    def add(part: str, params: Iterable[nn.Parameter]) -> None:
        found[part].update({id(param): param for param in params})

    if isinstance(model, MoekitForCausalLM):
        add("routers", model.model.shared.parameters())
        for layer in model.moe_layers():
            add("routers", layer.router.parameters())
            add("experts", layer.pool.parameters())
            if layer.shared is not None:
                add("shared", layer.shared.parameters())
    else:
        for site in find_moe(model):
            add("routers", site.router.parameters() if site.router is not None else ())
            add("experts", site.experts.parameters())
            for _, shared in site.shared:
                add("shared", shared.parameters())
    for get in ("get_input_embeddings", "get_output_embeddings"):
        module = getattr(model, get)()
        add("embeddings", module.parameters() if module is not None else ())
    taken = {id_ for group in found.values() for id_ in group}
    for name, param in model.named_parameters():
        if id(param) in taken:
            continue
        if "norm" in name.rpartition(".")[0].rpartition(".")[2]:
            add("norms", [param])
        elif "attn" in name or "attention" in name:
            add("attention", [param])
    return {part: list(group.values()) for part, group in found.items()}


def freeze(model: nn.Module, parts: Iterable[str]) -> int:
    """Keep `parts` from learning; returns how many numbers that are.

    Gradients that are there already are dropped, so that an optimiser leaves them alone from now.
    Raises UserError where a part does not exist in the model or nothing would be left to learn.
    """
    known, frozen = parts_of(model), 0
    for part in parts:
        if not known[part]:
            raise UserError(f"train.freeze names {part}, of which this model has none.")
        for param in known[part]:
            param.requires_grad_(False)
            param.grad = None
            frozen += param.numel()
    if not any(param.requires_grad for param in model.parameters()):
        raise UserError("train.freeze leaves nothing to learn.")
    return frozen
