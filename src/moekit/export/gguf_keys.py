"""The metadata of a GGUF file that describes the model: sizes, rotary embedding, routing rule."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from transformers import PretrainedConfig

from moekit.core.errors import UserError
from moekit.core.layer_spec import LayerSpec
from moekit.core.spec import MoESpec
from moekit.export.gguf_families import FAMILIES, SIGMOID, GgufFamily

SILU = ("silu", "swish")
FULL, SLIDING = "full_attention", "sliding_attention"
# Both scale the frequencies of the rotary embedding; llama.cpp has them under the same names.
LINEAR, YARN = "linear", "yarn"
# llama.cpp expects latent attention without a query rank in models of this depth only.
LITE_LAYERS = (26, 27)


def family_of(model_type: str) -> GgufFamily:
    """The row of a family; `UserError` with the known ones for any other."""
    if model_type not in FAMILIES:
        raise UserError(
            f"GGUF of {model_type!r} is not supported; known are {', '.join(sorted(FAMILIES))}."
        )
    return FAMILIES[model_type]


def check_family(family: GgufFamily, config: PretrainedConfig, spec: MoESpec) -> None:
    """Raise `UserError` where llama.cpp would compute something else than the config says."""
    for problem in _problems(family, config, spec):
        raise UserError(f"{problem}: this {config.model_type} cannot be written as GGUF.")


def differences(config: PretrainedConfig) -> list[str]:
    """What llama.cpp computes a little differently for a model that passes `check_family`."""
    rope = _rope(config)
    if rope["rope_type"] != YARN or rope.get("truncate") is not False:
        return []
    # No key and no tensor of this architecture says otherwise.
    return [
        "llama.cpp rounds YaRN's bounds (rope_parameters.truncate is False here): logits differ "
        "from transformers', as in every GGUF of such a model."
    ]


def _problems(family: GgufFamily, config: PretrainedConfig, spec: MoESpec) -> Iterator[str]:
    dense = spec.num_layers - len(spec.per_layer)
    if spec.moe_layers != tuple(range(dense, spec.num_layers)) or (
        dense and not family.dense_first
    ):
        where = "after the dense ones" if family.dense_first else "in every layer"
        yield f"experts are in layers {list(spec.moe_layers)}, llama.cpp wants them {where}"
    for layer in spec.per_layer:
        yield from _routing_problems(family, layer)
    if len({(layer.num_experts, layer.top_k, layer.expert_width) for layer in spec.per_layer}) > 1:
        yield "the layers have different experts"
    activation = getattr(config, "hidden_act", "silu")
    if activation not in SILU:
        yield f"hidden_act is {activation!r}, llama.cpp computes 'silu'"
    if SLIDING in _attention(config) and not family.windows:
        yield "attention has a sliding window, llama.cpp computes full attention"
    if family.windows and any(
        kind != (FULL if index % 2 else SLIDING) for index, kind in enumerate(_attention(config))
    ):
        yield "attention has no sliding window in every other layer, beginning with the first"
    if others := sorted(set(_attention(config)) - {FULL, SLIDING}):
        yield f"layer_types are {others}"
    for name, values in family.fixed.items():
        if getattr(config, name, values[0]) not in values:
            yield f"{name} is {getattr(config, name)!r}, llama.cpp computes {values[0]!r}"
    rope = _rope(config)
    if rope["rope_type"] not in ("default", LINEAR, YARN):
        yield f"rope_type is {rope['rope_type']!r}; default, {LINEAR} and {YARN} can be written"
    if rope["rope_type"] == YARN:
        scales = rope.get("mscale"), rope.get("mscale_all_dim")
        if scales[0] != scales[1] or bool(scales[0]) != family.latent:
            yield f"YaRN's mscale and mscale_all_dim are {scales[0]} and {scales[1]}"
    layers = config.num_hidden_layers
    if family.latent and config.q_lora_rank is None and layers not in LITE_LAYERS:
        yield f"q_lora_rank is None in a model of {layers} layers"


def _routing_problems(family: GgufFamily, layer: LayerSpec) -> Iterator[str]:
    where = f"layer {layer.layer_index}"
    if layer.score != family.score or layer.selection != "topk":
        yield f"{where} routes by {layer.score!r}, llama.cpp computes {family.score!r}"
    if family.normalize is not None and layer.normalize != family.normalize:
        yield f"{where} has normalised weights: {layer.normalize}, llama.cpp: {family.normalize}"
    if not family.scales and layer.scaling != 1:
        yield f"{where} scales its weights by {layer.scaling:g}"
    if layer.num_groups > 1 and layer.group_score != "top2":
        yield f"{where} ranks groups by their best expert, llama.cpp by their two best"
    if layer.bias_on not in (None, "scores"):
        yield f"{where} adds its correction bias to {layer.bias_on}"
    unlike = {"output_scaling": 1.0, "logit_scale": 1.0, "logit_cap": 0.0, "num_null_experts": 0}
    for name, value in unlike.items():
        if getattr(layer, name) != value:
            yield f"{where} has {name} {getattr(layer, name)}"


def _attention(config: PretrainedConfig) -> list[str]:
    types = getattr(config, "layer_types", None)
    if types is None:
        window = getattr(config, "sliding_window", None)
        types = [FULL if window is None else SLIDING] * config.num_hidden_layers
    return list(types)


def _rope(config: PretrainedConfig) -> dict[str, Any]:
    return {"rope_type": "default", **(getattr(config, "rope_parameters", None) or {})}


def add_keys(writer: Any, family: GgufFamily, config: PretrainedConfig, spec: MoESpec) -> None:
    """Describe a model that passed `check_family` to a `gguf.GGUFWriter`."""
    heads = config.num_attention_heads
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    # Where every layer has experts some configs have no other width.
    writer.add_feed_forward_length(getattr(config, "intermediate_size", None) or spec.expert_width)
    if family.latent:
        _add_latent(writer, config)
    else:
        head = getattr(config, "head_dim", None) or config.hidden_size // heads
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(head)
        writer.add_value_length(head)
        writer.add_rope_dimension_count(int(head * _rope(config).get("partial_rotary_factor", 1)))
    if family.windows:
        writer.add_sliding_window(config.sliding_window)
    _add_rope(writer, family, config)
    _add_routing(writer, family, spec)
    for method, name in family.keys.items():
        if getattr(config, name, None) is not None:
            getattr(writer, method)(getattr(config, name))


def _add_latent(writer: Any, config: PretrainedConfig) -> None:
    """Latent attention runs as one key-value head of the latent width; its own widths go apart."""
    rope = config.qk_rope_head_dim
    writer.add_head_count_kv(1)
    if config.q_lora_rank is not None:
        writer.add_q_lora_rank(config.q_lora_rank)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    writer.add_key_length(config.kv_lora_rank + rope)
    writer.add_value_length(config.kv_lora_rank)
    writer.add_key_length_mla(config.qk_nope_head_dim + rope)
    writer.add_value_length_mla(config.v_head_dim)
    writer.add_rope_dimension_count(rope)


def _add_rope(writer: Any, family: GgufFamily, config: PretrainedConfig) -> None:
    import gguf

    rope = _rope(config)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope["rope_type"] == "default":
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
    writer.add_rope_scaling_factor(float(rope["factor"]))
    if rope["rope_type"] == YARN:
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        for name in ("beta_fast", "beta_slow"):
            if rope.get(name) is not None:
                getattr(writer, f"add_rope_scaling_yarn_{name}")(float(rope[name]))
        if rope.get("attention_factor") is not None:
            # llama.cpp multiplies YaRN's own factor by this one.
            own = 1 + 0.1 * math.log(rope["factor"])
            writer.add_rope_scaling_attn_factors(rope["attention_factor"] / own)
        if family.latent and rope.get("mscale_all_dim"):
            # llama.cpp expects a tenth of it in this architecture and no other.
            writer.add_rope_scaling_yarn_log_mul(0.1 * rope["mscale_all_dim"])


def _add_routing(writer: Any, family: GgufFamily, spec: MoESpec) -> None:
    import gguf

    layer = spec.per_layer[0]
    writer.add_expert_count(layer.num_experts)
    writer.add_expert_used_count(layer.top_k)
    writer.add_expert_feed_forward_length(layer.expert_width)
    if family.dense_first:
        writer.add_leading_dense_block_count(spec.num_layers - len(spec.per_layer))
    if layer.num_groups > 1:
        writer.add_expert_group_count(layer.num_groups)
        writer.add_expert_group_used_count(layer.topk_groups)
    if family.normalize is None:
        writer.add_expert_weights_norm(bool(layer.normalize))
    if family.scales:
        writer.add_expert_weights_scale(layer.scaling)
    if family.gating_key:
        kinds = gguf.ExpertGatingFuncType
        writer.add_expert_gating_func(kinds.SIGMOID if layer.score == SIGMOID else kinds.SOFTMAX)
