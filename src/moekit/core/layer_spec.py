"""`LayerSpec`: one MoE layer, read from the structure of its modules and the family table."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from moekit.core import family_table as table
from moekit.core.errors import UserError
from moekit.core.family_table import Attr, Bank, Rule, Switch
from moekit.core.find import MoESite


@dataclass(frozen=True)
class LayerSpec:
    """One MoE layer: its experts, its routing rule (see `family_table.Rule`) and its storage.

    `hidden_size` and `expert_width` are what an expert sees; `shared_width` adds up the shared
    experts. `scaling` multiplies the weights that the experts get, `output_scaling` their sum.
    `num_null_experts` are choices without weights. In an unknown family `score` is "unknown" and
    `normalize` None.
    """

    layer_index: int
    path: str
    num_experts: int
    top_k: int
    hidden_size: int
    expert_width: int
    score: str
    normalize: bool | None
    logit_scale: float
    logit_cap: float
    scaling: float
    output_scaling: float
    num_groups: int
    topk_groups: int
    group_score: str | None
    has_correction_bias: bool
    bias_on: str | None
    has_expert_scale: bool
    selection: str
    normalizes_with_shared: bool
    scales_input: bool
    num_null_experts: int
    num_shared_experts: int
    shared_width: int
    fused: bool
    transposed: bool
    interleaved: bool
    has_bias: bool
    has_gate: bool
    params_per_expert: int


def describe_layer(site: MoESite, config: PretrainedConfig) -> LayerSpec:
    """Describe one MoE layer of the model that `config` belongs to."""
    bank = _bank(site)
    num_experts, hidden, width = _sizes(site, bank, config)
    top_k = table.TOP_K.get(family_of(site)) or int(_first(site, config, table.TOP_K_NAMES))
    rule = _rule(site, config)
    bias = _has(site, table.CORRECTION_BIAS_NAMES)
    groups, topk_groups = (getattr(site.router, name, None) or 1 for name in table.GROUP_NAMES)
    if rule is not None and rule.group_score is None:
        groups = topk_groups = 1
    scaling, output_scaling = _scaling(site, rule, top_k)
    tensors = [p for n, p in site.experts.named_parameters() if n.startswith(expert_tensors(site))]
    # Rows, not E: longcat_flash keeps unused rows for its experts without weights.
    stacked = bank.dims[0] == "E"
    return LayerSpec(
        layer_index=site.layer_index,
        path=site.path,
        num_experts=num_experts,
        top_k=top_k,
        hidden_size=hidden,
        expert_width=width,
        score=str(_value(site, config, rule.score)) if rule else "unknown",
        normalize=bool(_value(site, config, rule.normalize)) if rule else None,
        logit_scale=float(_value(site, config, rule.logit_scale)) if rule else 1.0,
        logit_cap=float(_value(site, config, rule.logit_cap)) if rule else 0.0,
        scaling=scaling,
        output_scaling=output_scaling,
        num_groups=groups,
        topk_groups=topk_groups,
        group_score=rule.group_score if rule and groups > 1 else None,
        has_correction_bias=bias,
        bias_on=rule.bias_on if rule and bias else None,
        has_expert_scale=_has(site, table.EXPERT_SCALE_NAMES),
        selection=_selection(site, rule),
        normalizes_with_shared=rule.with_shared if rule else False,
        scales_input=rule.scales_input if rule else False,
        num_null_experts=_null_experts(site, num_experts),
        num_shared_experts=_num_shared(site, config),
        shared_width=sum(_shared_widths(site)),
        fused=bank.fused,
        transposed=bank.dims == ("E", "F", "D"),
        interleaved=not getattr(site.experts, "is_concatenated", True),
        has_bias=bank.biased,
        has_gate=bank.gated,
        params_per_expert=sum(p.numel() // (len(p) if stacked else num_experts) for p in tensors),
    )


def family_of(site: MoESite) -> str:
    """The folder of `transformers.models` whose code the layer runs, "" for any other code."""
    parts = type(site.block).__module__.split(".")
    return parts[2] if parts[:2] == ["transformers", "models"] else ""


def expert_tensors(site: MoESite) -> tuple[str, ...]:
    """The name prefixes, below the experts module, of the parameters of the routed experts."""
    return _bank(site).tensors


def _bank(site: MoESite) -> Bank:
    if site.kind == "adapter" and family_of(site) in table.BANKS:
        return table.BANKS[family_of(site)]
    experts = site.experts
    gated = "gate_up_proj" in experts._parameters or "gate_proj" in experts._parameters
    return Bank(
        "down_proj",
        ("E", "F", "D") if getattr(experts, "is_transposed", False) else ("E", "D", "F"),
        gated=gated,
        fused="gate_up_proj" in experts._parameters,
        biased="down_proj_bias" in experts._parameters,
        tensors=table.SEAM_TENSORS,
    )


def _sizes(site: MoESite, bank: Bank, config: PretrainedConfig) -> tuple[int, int, int]:
    shape = dict(zip(bank.dims, site.experts.get_parameter(bank.down).shape, strict=True))
    if "E" in shape:
        return shape["E"], shape["D"], shape.get("F", 1)
    num_experts = int(_first(site, config, table.NUM_EXPERTS_NAMES))
    return num_experts, shape["D"], shape["F"] if "F" in shape else shape["EF"] // num_experts


def _rule(site: MoESite, config: PretrainedConfig) -> Rule | None:
    rule = table.RULES.get(family_of(site))
    if isinstance(rule, Switch):
        return rule.rules.get(str(_value(site, config, rule.attribute)))
    return rule


def _holders(site: MoESite, config: PretrainedConfig) -> Iterator[Any]:
    yield site.router
    yield site.block
    yield site.experts
    yield getattr(site.experts, "config", None)
    yield config.get_text_config(decoder=True)


def _first(site: MoESite, config: PretrainedConfig, names: tuple[str, ...]) -> Any:
    for holder in _holders(site, config):
        for name in names:
            value = getattr(holder, name, None)
            if value is not None:
                return value
    raise UserError(
        f"the config of model_type {config.model_type!r} gives no value for any of "
        f"{', '.join(names)}, which its MoE layer {site.path} needs."
    )


def _value(site: MoESite, config: PretrainedConfig, value: Any) -> Any:
    if not isinstance(value, Attr):
        return value
    holders = (site.router, site.block) if value.default is not None else _holders(site, config)
    for holder in holders:
        if hasattr(holder, value.name):
            return getattr(holder, value.name)
    return value.default


def _scaling(site: MoESite, rule: Rule | None, top_k: int) -> tuple[float, float]:
    if rule is not None and rule.averaged:
        return 1 / top_k, float(top_k)
    router, block = (
        next((float(getattr(m, n)) for n in table.SCALING_NAMES if hasattr(m, n)), 1.0)
        for m in (site.router, site.block)
    )
    if site.shared and getattr(site.block, table.SHARED_STRATEGY_NAME, None) == "average":
        block /= 2
    # nllb_moe scales in the experts themselves by the share of tokens that training keeps.
    return router, block * (1 - float(getattr(site.experts, "moe_token_dropout", 0.0)))


def _has(site: MoESite, names: tuple[str, ...]) -> bool:
    own = [site.block, *([] if site.router is None else site.router.modules())]
    return any(name in {*m._parameters, *m._buffers} for m in own for name in names)


def _selection(site: MoESite, rule: Rule | None) -> str:
    if site.router is not None and "tid2eid" in site.router._buffers:
        return "hash"
    return rule.selection if rule else "unknown"


def _null_experts(site: MoESite, num_experts: int) -> int:
    for name in table.CHOICES_NAMES:
        if hasattr(site.router, name):
            return int(getattr(site.router, name)) - num_experts
    return 0


def _num_shared(site: MoESite, config: PretrainedConfig) -> int:
    if not any(_shared_widths(site)):
        return 0
    for holder in _holders(site, config):
        for name in table.NUM_SHARED_NAMES:
            if getattr(holder, name, None):
                return int(getattr(holder, name))
    return 1


def _shared_widths(site: MoESite) -> Iterator[int]:
    for path, shared in site.shared:
        for name, module in shared.named_modules(prefix=path):
            if name.rpartition(".")[2] in table.SHARED_DOWN_NAMES and isinstance(module, nn.Linear):
                yield module.in_features
        down = shared._parameters.get("down_proj")
        if down is not None:
            yield math.prod(down.shape) // down.shape[-2]


def bank_block(site: MoESite) -> int:
    """Rows of one expert on the first axis of the tensors that hold the experts."""
    if _bank(site).dims[0] != "EF":
        return 1
    experts: Any = site.experts  # of dbrx, the only family with flat banks
    return int(experts.ffn_hidden_size)
