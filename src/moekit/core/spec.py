"""`MoESpec`: what a MoE model is, from its config alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from moekit.core.architecture import OWN_TYPES, meta_model, read_config
from moekit.core.errors import UserError
from moekit.core.find import MoESite, find_moe
from moekit.core.layer_spec import LayerSpec, describe_layer, expert_tensors
from moekit.core.memory import model_bytes
from moekit.core.param_count import LayerShare, ParamCounts, count_params


@dataclass(frozen=True)
class MoESpec:
    """The MoE layers of a model in execution order, and the parameters of the whole model.

    `num_experts`, `top_k` and `expert_width` are maxima over layers, `num_layers` counts all
    decoder layers and `moe_layers` lists those with experts. `quantization` is the method of a
    natively quantised checkpoint; the counts are those of the plain architecture.
    """

    model_type: str
    architecture: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    tied_embeddings: bool
    dtype: str | None
    quantization: str | None
    per_layer: tuple[LayerSpec, ...]
    params: ParamCounts

    @classmethod
    def from_config(cls, config: PretrainedConfig | Mapping[str, Any]) -> MoESpec:
        """Describe the model of a config object or dict, as `spec_from_config`."""
        return spec_from_config(config)

    @classmethod
    def from_dir(cls, path: str | Path) -> MoESpec:
        """Describe the model of a directory that holds a `config.json`, or of such a file."""
        return spec_from_config(path)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        return tuple(layer.layer_index for layer in self.per_layer)

    @property
    def num_experts(self) -> int:
        return max(layer.num_experts for layer in self.per_layer)

    @property
    def top_k(self) -> int:
        return max(layer.top_k for layer in self.per_layer)

    @property
    def expert_width(self) -> int:
        return max(layer.expert_width for layer in self.per_layer)

    @property
    def total_params(self) -> int:
        return self.params.total

    @property
    def active_params(self) -> int:
        return self.params.active

    def bytes(self, bits: float, router_bits: float = 16) -> int:
        """Bytes of the weights at `bits` each; routers and norms keep at least `router_bits`."""
        return model_bytes(self.params.parts, bits, router_bits)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values, with the maxima beside the layers."""
        return {
            **asdict(self),
            "per_layer": [asdict(layer) for layer in self.per_layer],
            "moe_layers": list(self.moe_layers),
            "num_experts": self.num_experts,
            "top_k": self.top_k,
            "expert_width": self.expert_width,
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)


def spec_from_config(config: PretrainedConfig | Mapping[str, Any] | str | Path) -> MoESpec:
    """Describe the MoE model of a config object, a dict, a `config.json` or its directory.

    The architecture is built on the meta device, which allocates nothing and takes well under a
    second. Raises `UserError` for a config that is broken, unknown or of a dense model.
    """
    read = read_config(config)
    return spec_of(meta_model(read), read)


def spec_of(model: PreTrainedModel, config: PretrainedConfig | None = None) -> MoESpec:
    """Describe a built model, on any device; `config` defaults to the model's own."""
    config = model.config if config is None else config
    sites = find_moe(model)
    if not sites and config.model_type in OWN_TYPES:
        raise UserError(
            f"{config.model_type!r} has no bank of experts to look into: `moekit eval` measures it "
            "and `moekit.load_language_model` loads it."
        )
    if not sites:
        raise UserError(
            f"{config.model_type!r} ({type(model).__name__}) has no MoE layers: no module of it "
            "holds a bank of experts beside a router. moekit works on MoE models only."
        )
    text = config.get_text_config(decoder=True)
    layers = tuple(describe_layer(site, config) for site in sites)
    quantization = getattr(config, "quantization_config", None)
    if not isinstance(quantization, Mapping):
        quantization = quantization.to_dict() if quantization is not None else {}
    return MoESpec(
        model_type=config.model_type,
        architecture=type(model).__name__,
        num_layers=_num_layers(text, sites),
        hidden_size=text.hidden_size,
        vocab_size=getattr(text, "vocab_size", 0),
        tied_embeddings=_tied(model),
        dtype=str(config.dtype).removeprefix("torch.") if config.dtype is not None else None,
        quantization=quantization.get("quant_method"),
        per_layer=layers,
        params=count_params(
            model, sites, [_share(s, n) for s, n in zip(sites, layers, strict=True)]
        ),
    )


def _share(site: MoESite, layer: LayerSpec) -> LayerShare:
    return LayerShare(layer.top_k, layer.params_per_expert, expert_tensors(site))


def _num_layers(text: PretrainedConfig, sites: list[MoESite]) -> int:
    declared = getattr(text, "num_hidden_layers", None)
    return declared or 1 + max(site.layer_index for site in sites)


def _tied(model: PreTrainedModel) -> bool:
    head = model.get_output_embeddings()
    if head is None:
        return False
    table = model.get_input_embeddings()
    return getattr(head, "weight", None) is getattr(table, "weight", head)
