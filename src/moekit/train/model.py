"""Building the model of a recipe and finding what the trainer touches in it."""

import difflib
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from moekit.core.errors import UserError
from moekit.core.find import find_moe
from moekit.ops import blocked_attention
from moekit.ops.grouped import GROUPED, grouped_backend, has_plain_banks

from .recipe import Recipe


def build_model(recipe: Recipe, vocab_size: int, end_id: int) -> Any:
    """The recipe's model in fp32, freshly initialised from `train.seed`.

    Raises UserError for an unknown family or arguments that its config rejects.
    """
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    arguments = dict(recipe.model)
    family = arguments.pop("model_type")
    if family not in CONFIG_MAPPING:
        near = difflib.get_close_matches(family, list(CONFIG_MAPPING.keys()), 3)
        raise UserError(f"model.model_type '{family}' is unknown; near matches: {near}.")
    arguments |= {"vocab_size": vocab_size, "eos_token_id": end_id, "bos_token_id": None}
    arguments["pad_token_id"] = None
    if recipe.train.init_std is not None:
        arguments["initializer_range"] = recipe.train.init_std
    _check_counts(recipe.model)
    try:
        config = CONFIG_MAPPING[family](**arguments)
    except (ValueError, TypeError) as error:
        raise UserError(f"model: {family} rejects these arguments: {error}") from error
    torch.manual_seed(recipe.train.seed)
    attention = recipe.train.attention
    config._attn_implementation = (
        blocked_attention.register() if attention == "blocked" else attention
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if find_moe(model):
        model.set_experts_implementation(_experts(recipe.train.experts, model))
    if recipe.train.zero_output:
        zero_residual_outputs(model)
    return model.train()


def _check_counts(arguments: dict) -> None:
    experts = arguments.get("num_experts", arguments.get("n_routed_experts"))
    top_k = arguments.get("num_experts_per_tok")
    if experts is not None and top_k is not None and top_k > experts:
        raise UserError(
            f"model.num_experts_per_tok {top_k} exceeds the {experts} experts; lower it."
        )
    width = arguments.get("moe_intermediate_size")
    if width is not None and width % 8:
        raise UserError(f"model.moe_intermediate_size {width} is not a multiple of 8.")


def _experts(name: str, model: nn.Module) -> str:
    if name != "grouped":
        return name
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if not all(has_plain_banks(site.experts) for site in find_moe(model)):
        return "grouped_mm"
    ALL_EXPERTS_FUNCTIONS.register(GROUPED, grouped_backend)
    return GROUPED


@torch.no_grad()
def zero_residual_outputs(model: nn.Module) -> None:
    """Zero the projections that write to the residual stream, so that every block starts silent."""
    for name, param in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj", "down_proj.weight")):
            param.zero_()


@dataclass
class RouterTap:
    """Collects what the routers of one forward pass said, layer by layer.

    `logits` [T, E] and `ids` [T, K] are lists over layers, cleared by `reset`.
    """

    num_experts: list[int]
    biases: list[Tensor]
    router_names: set[str]
    fused_names: set[str]

    def __post_init__(self) -> None:
        self.logits: list[Tensor] = []
        self.ids: list[Tensor] = []

    def reset(self) -> None:
        self.logits, self.ids = [], []

    def _record(self, module, args, output) -> None:
        # Evaluation and probes pass through the same routers; only training steps count.
        if not module.training:
            return
        experts = self.num_experts[len(self.logits)]
        if output[0].shape[-1] != experts or output[2].is_floating_point():
            raise UserError(
                f"{type(module).__name__} does not return (logits, weights, ids); the trainer "
                "cannot balance this family yet."
            )
        self.logits.append(output[0])
        self.ids.append(output[2])


def tap_routers(model: nn.Module) -> RouterTap:
    """Hook every router of `model`; a dense model gives a tap that stays empty."""
    names = {id(param): name for name, param in model.named_parameters()}
    tap = RouterTap([], [], set(), set())
    for site in find_moe(model):
        router, experts = site.router, cast(Any, site.experts)
        if router is None:
            raise UserError(f"{site.path}: no separate router module; cannot be trained here yet.")
        tap.num_experts.append(int(experts.num_experts))
        bias = getattr(router, "e_score_correction_bias", None)
        if isinstance(bias, Tensor):
            tap.biases.append(bias)
        tap.router_names |= {names[id(param)] for param in router.parameters()}
        bank = getattr(experts, "gate_up_proj", None)
        if bank is not None and experts.is_concatenated and not experts.is_transposed:
            tap.fused_names.add(names[id(bank)])
        router.register_forward_hook(tap._record)
    return tap
