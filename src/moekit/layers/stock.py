"""Models that equal a family of transformers, written as that family.

What a checkpoint computes when nobody trains it decides: noise, jitter, thinning and a capacity
that hold in training only are no difference.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moekit.core.errors import UserError

from .config import MoekitConfig
from .edits import Capacity, SecondThinning
from .experts.ffn import SwiGLUExperts
from .model import DenseMLP, MoekitForCausalLM
from .moe import MoELayer
from .router import PipelineRouter
from .routers.candidate_schedule import RandomCandidates
from .routers.token_rounding import TileRounding
from .score import LinearScore
from .select import TopK
from .terms import ExpertBias, GroupLimit, Noise
from .weigh import RawWeights, RenormalisedWeights

# attention, squash, whether there is a shared expert: the family, and how it names dense layers.
_FAMILIES = {
    ("qwen3", "softmax", False): ("qwen3_moe", "mlp_only_layers"),
    ("mixtral", "softmax", False): ("mixtral", None),
    ("qwen3", "sigmoid", True): ("dots1", "first_k_dense_replace"),
    ("deepseek_v3", "sigmoid", True): ("deepseek_v3", "first_k_dense_replace"),
}


class _NoStock(Exception):
    """Why a model equals no stock family."""


@dataclass(frozen=True)
class _Rule:
    """The routing of a layer, as far as stock families differ in it."""

    squash: str
    top_k: int
    num_experts: int
    expert_width: int
    shared_width: int
    renormalised: bool
    scale: float
    groups: int
    keep_groups: int


def stock_family(model: MoekitForCausalLM) -> str | None:
    """The model type of transformers that computes exactly what `model` does, or None."""
    try:
        return _stock_config(model).model_type
    except _NoStock:
        return None


def to_stock(model: MoekitForCausalLM) -> Any:
    """`model` as a model of the stock family that it equals, on the CPU, with copied weights.

    Raises UserError that says what no stock family has.
    """
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    try:
        config = _stock_config(model)
    except _NoStock as why:
        raise UserError(f"this model equals no stock family: {why}") from why
    with no_init_weights():
        stock = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    stock.load_state_dict(dict(_renamed(model)), strict=True)
    return stock.train(model.training)


def _stock_config(model: MoekitForCausalLM) -> Any:
    from transformers import CONFIG_MAPPING

    config: MoekitConfig = model.config
    layers = [layer.mlp for layer in model.model.layers]
    rules = {_rule(mlp) for mlp in layers if not isinstance(mlp, DenseMLP)}
    if len(rules) != 1:
        raise _NoStock("its MoE layers differ" if rules else "it has no MoE layer")
    (rule,) = rules
    dense = [i for i, mlp in enumerate(layers) if isinstance(mlp, DenseMLP)]
    found = _FAMILIES.get((config.attention, rule.squash, bool(rule.shared_width)))
    if found is None:
        shared = "with" if rule.shared_width else "without"
        raise _NoStock(
            f"attention {config.attention}, {rule.squash} scores, {shared} a shared expert"
        )
    family, dense_field = found
    if (config.elastic_depth or {}).get("eval", len(layers)) != len(layers):
        raise _NoStock("layers that are left out")
    if config.moe_attention is not None:
        raise _NoStock("experts in its attention")
    if config.sliding_window is not None:
        raise _NoStock("a sliding window")
    if rule.squash == "softmax" and (rule.scale != 1 or rule.groups > 1):
        raise _NoStock("softmax scores with a scale or groups")
    if family == "mixtral" and not rule.renormalised:
        raise _NoStock("mixtral with raw weights")
    if dense and (
        dense_field is None
        or (dense_field == "first_k_dense_replace" and dense != list(range(len(dense))))
    ):
        raise _NoStock(f"dense layers {dense} in {family}")
    stock_class = CONFIG_MAPPING[family]
    known = {field.name for field in dataclasses.fields(stock_class)}
    values = {name: value for name, value in config.to_dict().items() if name in known}
    for unknown in ("architectures", "model_type", "transformers_version"):
        values.pop(unknown, None)
    values |= {
        "num_experts_per_tok": rule.top_k,
        "norm_topk_prob": rule.renormalised,
        "moe_intermediate_size": rule.expert_width,
        "sliding_window": None,
    }
    if family in ("qwen3_moe", "mixtral"):
        values["num_experts"] = rule.num_experts
    else:
        values |= {
            "n_routed_experts": rule.num_experts,
            "n_shared_experts": rule.shared_width // rule.expert_width,
            "n_group": rule.groups,
            "topk_group": rule.keep_groups,
            "routed_scaling_factor": rule.scale,
        }
    if family == "mixtral":
        # Its experts are as wide as its MLP would be; there is no dense layer to want another.
        values["intermediate_size"] = rule.expert_width
    if dense_field == "mlp_only_layers":
        values[dense_field] = dense
    elif dense_field is not None:
        values[dense_field] = len(dense)
    if family == "deepseek_v3":
        values["num_mtp_layers"] = 0
    allowed = known | {"num_experts", "num_mtp_layers"}
    return stock_class(**{name: value for name, value in values.items() if name in allowed})


def _rule(layer: nn.Module) -> _Rule:
    """The rule of a MoE layer; _NoStock for parts that no stock family has."""
    if type(layer) is not MoELayer or layer.lent:
        raise _NoStock("a layer that is no plain MoE layer, or has no pool of its own")
    router, banks = layer.router, list(layer.pool.banks)
    if not isinstance(router, PipelineRouter) or router.units is not None:
        raise _NoStock(f"router {type(router).__name__}")
    if type(router.score) is not LinearScore or type(router.select) is not TopK:
        raise _NoStock("a router that is no top-k of a linear map")
    if len(banks) != 1 or type(banks[0]) is not SwiGLUExperts:
        raise _NoStock("experts other than SwiGLU")
    if type(router.weigh) not in (RawWeights, RenormalisedWeights):
        raise _NoStock(f"weights by {type(router.weigh).__name__}")
    squash = "sigmoid" if router.squash is torch.sigmoid else router.squash.__name__
    for edit in router.edits:
        trains = isinstance(edit, Capacity) and edit.eval_factor is None
        if not trains and not isinstance(edit, (SecondThinning, TileRounding)):
            raise _NoStock("pairs that are dropped outside of training")
    groups = keep = 1
    for term in router.terms:
        if type(term) is GroupLimit and term.best == 2:
            groups, keep = term.groups, term.keep
        elif not (type(term) is ExpertBias and squash == "sigmoid") and not isinstance(
            term, (Noise, RandomCandidates)
        ):
            raise _NoStock(f"the term {type(term).__name__} of the choice")
    bank, shared_width = banks[0], 0
    width = bank.down_proj.shape[-1]
    if layer.shared is not None:
        shared = layer.shared.bank
        if layer.shared.join != "sum" or type(shared) is not SwiGLUExperts:
            raise _NoStock("a shared expert that is no SwiGLU of weight 1")
        shared_width = shared.down_proj.shape[-1]
        if shared_width % width:
            raise _NoStock(f"a shared expert of width {shared_width} beside experts of {width}")
    return _Rule(
        squash,
        router.select.top_k,
        bank.num_experts,
        width,
        shared_width,
        type(router.weigh) is RenormalisedWeights,
        router.weigh.scale,
        groups,
        keep,
    )


def _renamed(model: MoekitForCausalLM) -> Iterator[tuple[str, Tensor]]:
    """The weights under the names of stock families, which agree where this applies."""
    for name, value in model.state_dict().items():
        block, _, rest = name.partition(".mlp.")
        mlp = f"{block}.mlp"
        if rest == "router.score.weight":
            yield f"{mlp}.gate.weight", value
            router: Any = model.get_submodule(f"{mlp}.router")
            if router.squash is torch.sigmoid:
                bias = [term.expert_bias for term in router.terms if isinstance(term, ExpertBias)]
                yield (
                    f"{mlp}.gate.e_score_correction_bias",
                    bias[0] if bias else torch.zeros(router.num_experts),
                )
        elif rest.startswith("pool.banks.0."):
            yield f"{mlp}.experts.{rest.removeprefix('pool.banks.0.')}", value
        elif rest == "shared.bank.gate_up_proj":
            gate, up = value[0].chunk(2)
            yield f"{mlp}.shared_experts.gate_proj.weight", gate
            yield f"{mlp}.shared_experts.up_proj.weight", up
        elif rest == "shared.bank.down_proj":
            yield f"{mlp}.shared_experts.down_proj.weight", value[0]
        elif not rest.startswith("router."):
            yield name, value
