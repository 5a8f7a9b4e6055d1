"""Building the model of a recipe and finding what the trainer touches in it."""

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from moekit.core.architecture import read_config
from moekit.core.errors import UserError
from moekit.core.find import find_moe
from moekit.core.load import find_config
from moekit.layers import MoekitConfig, MoekitForCausalLM, RouterContext, Routing
from moekit.layers.terms import ExpertBias
from moekit.ops import blocked_attention
from moekit.ops.grouped import GROUPED, grouped_backend, has_plain_banks

from .freeze import freeze
from .recipe import Recipe


def planned_vocab(recipe: Recipe) -> int:
    """Entries of the vocabulary before the tokenizer is there; 1 for a model that brings one."""
    return 1 if "path" in recipe.model else recipe.tokenizer.vocab_size


def model_config(recipe: Recipe, vocab_size: int, end_id: int) -> Any:
    """The config of the recipe's model.

    Raises UserError for an unknown family, arguments that its config rejects, and settings that
    parts of moekit's own layers refuse; nothing is allocated.
    """
    from transformers import CONFIG_MAPPING

    arguments = dict(recipe.model)
    if "path" in arguments:
        return _config_at(arguments.pop("path"), arguments, vocab_size)
    family = arguments.pop("model_type")
    if family not in CONFIG_MAPPING:
        near = difflib.get_close_matches(family, list(CONFIG_MAPPING.keys()), 3)
        raise UserError(f"model.model_type '{family}' is unknown; near matches: {near}.")
    arguments |= {"vocab_size": vocab_size, "eos_token_id": end_id, "bos_token_id": None}
    arguments["pad_token_id"] = None
    if recipe.train.init_std is not None:
        arguments["initializer_range"] = recipe.train.init_std
    _check_counts(recipe.model)
    if family == MoekitConfig.model_type:
        _check_names(arguments)
    try:
        config = CONFIG_MAPPING[family](**arguments)
    except (ValueError, TypeError) as error:
        raise UserError(f"model: {family} rejects these arguments: {error}") from error
    if family == MoekitConfig.model_type:
        with torch.device("meta"):
            MoekitForCausalLM(cast(MoekitConfig, config))
    return config


def _config_at(path: str, changes: dict[str, Any], vocab_size: int) -> Any:
    from transformers import AutoConfig

    # Also makes transformers know the types of moekit's own models.
    read_config(find_config(path))
    try:
        config = AutoConfig.from_pretrained(path, **changes)
    except (OSError, ValueError) as error:
        raise UserError(f"model.path {path} cannot be read: {error}") from error
    own = config.get_text_config(decoder=True).vocab_size
    if own < vocab_size:
        raise UserError(
            f"model.path {path} has a vocabulary of {own} and the tokenizer one of {vocab_size}; "
            "leave tokenizer.path out to use the model's."
        )
    return config


def build_model(recipe: Recipe, vocab_size: int, end_id: int) -> Any:
    """The recipe's model in fp32, freshly initialised from `train.seed` or read from its path.

    Raises UserError as `model_config`, and for parts to freeze that it lacks.
    """
    from transformers import AutoModelForCausalLM

    config = model_config(recipe, vocab_size, end_id)
    torch.manual_seed(recipe.train.seed)
    attention = recipe.train.attention
    config._attn_implementation = (
        blocked_attention.register() if attention == "blocked" else attention
    )
    path = recipe.model.get("path")
    if path is None:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=torch.float32)
    if find_moe(model) and not isinstance(model, MoekitForCausalLM):
        model.set_experts_implementation(_experts(recipe.train.experts, model))
    if recipe.train.recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    freeze(model, recipe.train.freeze)
    if recipe.train.zero_output and path is None:
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


def _check_names(arguments: dict) -> None:
    """UserError for an argument that MoekitConfig does not know; transformers would keep it."""
    known = {field.name for field in dataclasses.fields(MoekitConfig)}
    for name in arguments:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(known))}"
            raise UserError(f"model.{name} is unknown: {hint}")


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
    """Collects what the routers of one forward pass said: `records`.

    `biases` are the correction biases of a stock family, which the trainer moves; moekit's own
    layers move theirs themselves and are then `self_balanced`. `router_names` are the parameters
    that belong to no weight matrix of the hidden layers, `fused_names` the banks that hold gate and
    up one above the other.
    """

    num_experts: list[int]
    biases: list[Tensor]
    router_names: set[str]
    fused_names: set[str]

    def __post_init__(self) -> None:
        self.records: list[Routing] = []
        self.self_balanced = False
        self._listening = False

    def forward(self, model: Any, ids: Tensor, context: RouterContext) -> Tensor:
        """The logits [B, S, V] of `ids` [B, S]; the records are those of this pass."""
        if not isinstance(model, MoekitForCausalLM):
            self.records, self._listening = [], True
            logits = model(input_ids=ids, use_cache=False).logits
            self._listening = False
            return logits
        output = model(input_ids=ids, use_cache=False, router_context=context)
        self.records = output.routings
        return output.logits

    def _record(self, module, args, output) -> None:
        # Evaluation, probes and recomputation pass through the same routers; only the forward
        # passes of training count.
        if not (module.training and self._listening):
            return
        layer = len(self.records)
        experts = self.num_experts[layer]
        if output[0].shape[-1] != experts or output[2].is_floating_point():
            raise UserError(
                f"{type(module).__name__} does not return (logits, weights, ids); the trainer "
                "cannot balance this family yet."
            )
        logits, weights, ids = output[:3]
        self.records.append(Routing.from_topk(ids, weights, experts, logits=logits, layer=layer))


def tap_routers(model: nn.Module) -> RouterTap:
    """Hook every router of `model`; a dense model gives a tap that stays empty."""
    names = {id(param): name for name, param in model.named_parameters()}
    tap = RouterTap([], [], set(), set())
    if isinstance(model, MoekitForCausalLM):
        _note_parts(tap, model, names)
        return tap
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


def _note_parts(tap: RouterTap, model: MoekitForCausalLM, names: dict[int, str]) -> None:
    """Which parameters of moekit's layers are no plain matrices, and which are two in one."""
    tap.self_balanced = any(isinstance(module, ExpertBias) for module in model.modules())
    tap.router_names |= {names[id(param)] for param in model.model.shared.parameters()}
    for layer in model.moe_layers():
        tap.num_experts.append(layer.pool.num_experts)
        tap.router_names |= {names[id(param)] for param in layer.router.parameters()}
        for name, param in layer.named_parameters():
            if name.endswith("gate_up_proj"):
                tap.fused_names.add(names[id(param)])
            elif param.ndim < 3:
                # Matrices of the layer itself: a row an expert or a gate, not a map of the hidden.
                tap.router_names.add(names[id(param)])
