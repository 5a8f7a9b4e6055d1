"""Which models the native decoder runs, and what their layers are made of.

The modules of transformers are read for names and sizes; what they do not say is one row a family
in `decoder_families`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from moekit.core.architecture import meta_model
from moekit.core.find import MoESite, find_moe
from moekit.core.layer_spec import LayerSpec, describe_layer
from moekit.core.routing_rule import correction_bias, router_matrix
from moekit.ops.native import ACTIVATIONS
from moekit.ops.native.decoder import MAX_EXPERTS, MAX_GROUPS, MAX_HEAD_DIM, MAX_LATENT, SCORES
from moekit.runtime.decoder_families import FAMILIES, Family

# Kinds of rotary position whose angles depend on nothing but the position.
STATIC_ROTATIONS = ("default", "linear", "llama3", "yarn", "proportional")
_LANES = 16


class NotSupportedError(ValueError):
    """Why the native decoder does not run a model."""


@dataclass(frozen=True)
class RouterShape:
    """The tensors of a router by name, and the rule that it follows."""

    weight: str
    bias: str | None
    correction: str | None
    spec: LayerSpec
    smallest_sum: float


@dataclass(frozen=True)
class LayerShape:
    """A decoder layer: names of its tensors and modules, None for what it has not.

    `projections` are the modules "q", "k", "v" and "o" of attention; with latents "q" is applied to
    those of "q_a", and "k" makes keys and values of those of "kv_a". `moe` counts MoE layers. `mlp`
    are the gate, up and down projection of a dense layer, or of the shared experts, whose output
    `shared_gate` weighs.
    """

    norms: tuple[str | None, ...]
    projections: Mapping[str, str]
    q_norm: str | None
    k_norm: str | None
    q_a_norm: str | None
    kv_a_norm: str | None
    sinks: str | None
    window: int
    kind: str | None
    rotates: bool
    moe: int | None
    router: RouterShape | None
    mlp: tuple[str, str, str] | None
    shared_gate: str | None


@dataclass(frozen=True)
class Heads:
    """Sizes of attention; a latent of 0 is none."""

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    q_latent: int
    kv_latent: int
    latent_eps: float


@dataclass(frozen=True)
class DecoderShape:
    """A model that the native decoder runs: sizes, flags and the names of its tensors.

    `activation` is that of all MLPs, with `alpha` and `limit` where it is clamped.
    """

    family: Family
    config: PretrainedConfig
    width: int
    vocab: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    q_latent: int
    kv_latent: int
    latent_eps: float
    in_pairs: bool
    norm_is_wide: bool
    eps: float
    attention_scale: float
    activation: str
    alpha: float
    limit: float
    embedding: str
    final_norm: str
    head: str
    head_bias: str | None
    layers: tuple[LayerShape, ...]
    tensors: Mapping[str, tuple[int, ...]]
    rotary: type[nn.Module]

    def number(self, name: str, default: float) -> float:
        """A number of the config, by a name of `Family`; `default` where it has none."""
        value = getattr(self.config, name, None) if name else None
        return default if value is None else float(value)

    def angles(self, positions: int) -> dict[str | None, tuple[Tensor, Tensor]]:
        """cos and sin [positions, rotary / 2] for each type of layer, as the family makes them."""
        module: Any = self.rotary(self.config)
        made: dict[str | None, tuple[Tensor, Tensor]] = {}
        where = torch.arange(positions)[None]
        for kind in {layer.kind for layer in self.layers}:
            turns = module(torch.zeros(1), where, *([] if kind is None else [kind]))
            if isinstance(turns, Tensor):
                made[kind] = turns[0].real.contiguous(), turns[0].imag.contiguous()
                continue
            cos, sin = turns
            half = cos.shape[-1] if self.config.model_type == "gpt_oss" else cos.shape[-1] // 2
            made[kind] = cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()
        return made


def supports(config: PretrainedConfig) -> str | None:
    """Why the native decoder does not run the model of `config`, or None if it does."""
    try:
        decoder_shape(config)
    except NotSupportedError as reason:
        return str(reason)
    return None


def decoder_shape(config: PretrainedConfig) -> DecoderShape:
    """Describe the model of `config`; raises `NotSupportedError` with the reason."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise NotSupportedError(f"{config.model_type} is not among {', '.join(sorted(FAMILIES))}")
    model = meta_model(config)
    return _Reader(model, model.config, family).read()


class _Reader:
    """Reads a model on the meta device."""

    def __init__(self, model: PreTrainedModel, config: PretrainedConfig, family: Family) -> None:
        self.config, self.family = config, family
        self.base: Any = model.base_model
        self.names = {id(t): n for n, t in reversed(list(_tensors(model)))}
        self.modules = {id(m): n for n, m in model.named_modules()}
        self.head = model.get_output_embeddings()
        self.sites = {site.layer_index: site for site in find_moe(model)}
        self.shapes = {n: tuple(t.shape) for n, t in _tensors(model)}

    def read(self) -> DecoderShape:
        attention, width = self.base.layers[0].self_attn, self.config.hidden_size
        heads = self._heads(attention)
        dim, value_dim = heads.head_dim, heads.value_dim
        q_norm = getattr(attention, self.family.qk_norms[0], None)
        activation, alpha, limit = self._activation()
        pairs = self.family.in_pairs
        self._check(width % _LANES == 0, f"a width of {width} is no multiple of {_LANES}")
        widest = max(dim, value_dim)
        latent = heads.kv_latent
        self._check(latent <= MAX_LATENT, f"a latent of {latent} is wider than {MAX_LATENT}")
        narrow = latent > 0 or widest <= MAX_HEAD_DIM
        self._check(narrow, f"heads of {widest} are wider than {MAX_HEAD_DIM}")
        self._check(dim % 2 == 0, f"heads of an odd width, {dim}")
        shared = heads.heads % heads.kv_heads == 0
        self._check(shared, f"{heads.heads} heads do not share {heads.kv_heads} key heads")
        parts = [self.config.rope_parameters]
        if "rope_type" not in parts[0]:
            parts = list(parts[0].values())
        for part in parts:
            kind = part.get("rope_type", "default")
            self._check(kind in STATIC_ROTATIONS, f"rotary positions of type {kind}")
        return DecoderShape(
            family=self.family,
            config=self.config,
            width=width,
            vocab=self.head.out_features,
            **dataclasses.asdict(heads),
            in_pairs=pairs if isinstance(pairs, bool) else bool(getattr(self.config, pairs)),
            norm_is_wide=q_norm is not None and q_norm.weight.numel() != dim,
            eps=self.base.norm.variance_epsilon,
            attention_scale=float(attention.scaling),
            activation=activation,
            alpha=alpha,
            limit=limit,
            embedding=self._name(self.base.embed_tokens.weight),
            final_norm=self._name(self.base.norm.weight),
            head=self._name(self.head.weight),
            head_bias=None if self.head.bias is None else self._name(self.head.bias),
            layers=tuple(self._layer(i, layer) for i, layer in enumerate(self.base.layers)),
            tensors=self.shapes,
            rotary=type(self.base.rotary_emb),
        )

    def _heads(self, attention: Any) -> Heads:
        if not hasattr(attention, "kv_a_proj_with_mqa"):
            dim = attention.head_dim
            heads, kv_heads = (
                getattr(attention, name).out_features // dim for name in ("q_proj", "k_proj")
            )
            return Heads(heads, kv_heads, dim, dim, 0, 0, 0.0)
        return Heads(
            attention.num_heads,
            attention.num_heads,
            attention.qk_head_dim,
            attention.v_head_dim,
            attention.q_lora_rank or 0,
            attention.kv_lora_rank,
            attention.kv_a_layernorm.variance_epsilon,
        )

    def _layer(self, index: int, layer: Any) -> LayerShape:
        attention, site = layer.self_attn, self.sites.get(index)
        kinds: Any = getattr(self.config, "layer_types", None)
        slides = self.family.window == "config" or (
            self.family.window == "layers" and kinds[index] == "sliding_attention"
        )
        window = (self.config.sliding_window if slides else None) or 0
        every = not self.family.rotates_only_windows or self.config.sliding_window is None
        mlp, shared_gate = self._mlp(layer, site)
        names = (*self.family.qk_norms, "q_a_layernorm", "kv_a_layernorm")
        found = (getattr(attention, name, None) for name in names)
        norms = [None if norm is None else self._name(norm.weight) for norm in found]
        return LayerShape(
            norms=tuple(
                self._name(getattr(layer, norm).weight) if norm else None
                for norm in self.family.norms
            ),
            projections={
                part: self.modules[id(module)]
                for part, module in _projections(attention).items()
                if module is not None
            },
            q_norm=norms[0],
            k_norm=norms[1],
            q_a_norm=norms[2],
            kv_a_norm=norms[3],
            sinks=self._name(attention.sinks) if hasattr(attention, "sinks") else None,
            window=window,
            kind=kinds[index] if self._rotary_takes_kind() else None,
            rotates=every or window > 0,
            moe=None if site is None else sorted(self.sites).index(index),
            router=None if site is None else self._router(site),
            mlp=mlp,
            shared_gate=shared_gate,
        )

    def _rotary_takes_kind(self) -> bool:
        code = type(self.base.rotary_emb).forward
        while hasattr(code, "__wrapped__"):
            code = code.__wrapped__
        return "layer_type" in code.__code__.co_varnames[: code.__code__.co_argcount]

    def _mlp(
        self, layer: Any, site: MoESite | None
    ) -> tuple[tuple[str, str, str] | None, str | None]:
        parts = [layer.mlp] if site is None else [module for _, module in site.shared]
        found, gate = None, None
        for part in parts:
            if isinstance(part, nn.Linear) and part.out_features == 1 and part.bias is None:
                gate = self._name(part.weight)
                continue
            whole = all(hasattr(part, f"{n}_proj") for n in ("gate", "up", "down"))
            self._check(whole and found is None, f"{type(part).__name__} beside the experts")
            names = [self.modules[id(getattr(part, f"{n}_proj"))] for n in ("gate", "up", "down")]
            self._check(not any(f"{n}.bias" in self.shapes for n in names), "biases in an MLP")
            found = names[0], names[1], names[2]
        return found, gate

    def _router(self, site: MoESite) -> RouterShape:
        spec, router = describe_layer(site, self.config), site.router
        matrix = router_matrix(router, spec.num_experts) if router is not None else None
        if router is None or matrix is None:
            raise NotSupportedError("a router without a matrix")
        odd = {
            "a router of another kind": spec.score not in SCORES or spec.selection != "topk",
            "experts without weights": spec.num_null_experts != 0,
            "scales of single experts": spec.has_expert_scale,
            "weights that shared experts take part in": spec.normalizes_with_shared,
            "weights on the input of experts": spec.scales_input,
            "scaled outputs of experts": spec.output_scaling != 1,
            f"more than {MAX_EXPERTS} experts": spec.num_experts > MAX_EXPERTS,
            f"more than {MAX_GROUPS} groups": spec.num_groups > MAX_GROUPS,
        }
        for what, is_so in odd.items():
            self._check(not is_so, what)
        owner, leaf = matrix
        weight, bias = getattr(owner, leaf), getattr(owner, "bias", None)
        correction = correction_bias(router, site.block, {spec.num_experts})
        return RouterShape(
            weight=self._name(weight),
            bias=None if bias is None else self._name(bias),
            correction=None if correction is None else self._name(correction),
            spec=spec,
            smallest_sum=float(getattr(self.config, self.family.smallest_sum or "_", 1e-20)),
        )

    def _activation(self) -> tuple[str, float, float]:
        if self.family.activation:
            experts: Any = next(iter(self.sites.values())).experts
            return self.family.activation, float(experts.alpha), float(experts.limit)
        name = getattr(self.config, "hidden_act", "silu")
        name = {"gelu_pytorch_tanh": "gelu_tanh", "swish": "silu"}.get(name, name)
        self._check(name in ACTIVATIONS, f"the activation {name}")
        return name, 0.0, 0.0

    def _name(self, tensor: Tensor) -> str:
        return self.names[id(tensor)]

    @staticmethod
    def _check(holds: bool, otherwise: str) -> None:
        if not holds:
            raise NotSupportedError(otherwise)


def _projections(attention: Any) -> dict[str, nn.Module | None]:
    """The matrices of attention by the names that the decoder has for them."""
    if not hasattr(attention, "kv_a_proj_with_mqa"):
        return {part: getattr(attention, f"{part}_proj") for part in "qkvo"}
    whole = attention.q_a_proj is None
    return {
        "q": attention.q_proj if whole else attention.q_b_proj,
        "q_a": attention.q_a_proj,
        "kv_a": attention.kv_a_proj_with_mqa,
        "k": attention.kv_b_proj,
        "o": attention.o_proj,
    }


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
