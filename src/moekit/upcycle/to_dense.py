"""A MoE as a dense model of its family: the mean of its experts, or their neurons side by side.

A router mixes experts by the token; a dense network cannot. What is left is the mixture with fixed
weights: `average` mixes the weights of the experts, `slices` their outputs, whose neurons it lays
side by side. Shared experts are laid beside either. E experts, F neurons each, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, PretrainedConfig

from moekit.core.deferred import Deferred
from moekit.core.errors import UserError
from moekit.core.expert_source import ExpertSource, expert_sources
from moekit.core.expert_weights import ExpertWeights
from moekit.core.layer_spec import LayerSpec
from moekit.core.neurons import neuron_rows
from moekit.core.source_model import SourceModel
from moekit.core.stats import ExpertStats
from moekit.ops.align import match_weights
from moekit.upcycle.converter import Job, Made, preset, upcycler
from moekit.upcycle.ffn import FFN, PARTS, mean, neurons, scaled
from moekit.upcycle.start import Start
from moekit.upcycle.targets import NOT_COPIED

MIXTURES = ("uniform", "frequency", "gate")
SIGMOID_OF_ZERO = 0.5


@dataclass(frozen=True)
class Dense:
    """The dense family of a MoE family: conditions on the MoE's config (field: value), and values
    of the dense one; the module of shared experts and the gate in front of them."""

    family: str
    conditions: dict[str, Any] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    shared: str = ""
    shared_gate: str = ""


# MoE family: the dense families that compute the same but for the feed-forward network.
DENSE: dict[str, tuple[Dense, ...]] = {
    "mixtral": (
        Dense("llama", {"sliding_window": None}, {"attention_bias": False, "mlp_bias": False}),
        Dense("mistral"),
    ),
    "qwen2_moe": (
        Dense(
            "qwen2",
            {"qkv_bias": True, "use_sliding_window": False},
            {"use_sliding_window": False},
            "shared_expert",
            "shared_expert_gate",
        ),
        Dense(
            "llama",
            {"qkv_bias": False, "use_sliding_window": False},
            {"attention_bias": False, "mlp_bias": False},
            "shared_expert",
            "shared_expert_gate",
        ),
    ),
    "qwen3_moe": (Dense("qwen3", {"use_sliding_window": False}, {"use_sliding_window": False}),),
    "flex_olmo": (Dense("olmo2"),),
    "granitemoe": (Dense("granite", {}, {"mlp_bias": False}),),
    "ernie4_5_moe": (Dense("ernie4_5", {}, {}, "shared_experts"),),
    "glm4_moe": (
        Dense("qwen3", {"use_qk_norm": True, "attention_bias": False}, {}, "shared_experts"),
        Dense("qwen2", {"use_qk_norm": False, "attention_bias": True}, {}, "shared_experts"),
        Dense(
            "llama",
            {"use_qk_norm": False, "attention_bias": False},
            {"attention_bias": False, "mlp_bias": False},
            "shared_experts",
        ),
    ),
}


@upcycler(
    "moe-to-dense",
    title="A dense model out of a MoE; the methods below set it",
    needs=("weights",),
    limits="A dense network cannot choose by token: not equal unless all experts are the same. "
    "Families without a dense one of their kind are refused by name.",
    options={
        "slices": "lay the neurons of so many experts side by side; 0 averages the experts",
        "mixture": f"{', '.join(MIXTURES)}: what an expert counts; the last two read --stats",
        "align": "bring the neurons of experts into the order of the first one's before averaging; "
        "time grows with the cube of the width",
    },
)
def moe_to_dense(
    job: Job, *, slices: int = 0, mixture: str = "uniform", align: bool = False
) -> Made:
    """The dense model. Raises `UserError` for families that have none, and for a mixture whose
    statistics are missing."""
    job.need_mixture()
    job.need_alone()
    if mixture not in MIXTURES:
        raise UserError(f"mixture {mixture!r} is unknown; there are {', '.join(MIXTURES)}.")
    config = job.base.config
    dense = _dense_family(config)
    sources = expert_sources(dict(job.base.tensors), config)
    if slices and not 0 < slices <= min(source.spec.num_experts for source in sources):
        raise UserError(f"slices is {slices}; there are {sources[0].spec.num_experts} experts.")
    shares = [_shares(job, position, source, mixture) for position, source in enumerate(sources)]
    found = {}
    for source, share in zip(sources, shares, strict=True):
        experts = _experts(source)
        made = _side_by_side(experts, share, slices) if slices else _averaged(experts, share, align)
        shared = _shared(job.base, source.spec, dense)
        found[source.spec.layer_index] = made if shared is None else _joined([made, shared])
    return _made(job, dense, sources, found, _start(sources[0].spec, bool(slices), align))


def _dense_family(config: PretrainedConfig) -> Dense:
    if config.model_type not in DENSE:
        raise UserError(
            f"no dense class of transformers has the attention and norms of {config.model_type}; "
            f"there is one for {', '.join(DENSE)}."
        )
    rotary = (config.rope_parameters or {}).get("partial_rotary_factor", 1.0)
    if rotary != 1.0:
        raise UserError(
            f"this {config.model_type} rotates {rotary} of each head; its dense families rotate "
            "whole heads."
        )
    for dense in DENSE[config.model_type]:
        if all(getattr(config, name, None) == value for name, value in dense.conditions.items()):
            return dense
    wanted = " or ".join(str(dense.conditions) for dense in DENSE[config.model_type])
    raise UserError(f"a {config.model_type} becomes dense only with {wanted} in its config.")


def _shares(job: Job, position: int, source: ExpertSource, mixture: str) -> Tensor:
    """What every expert counts [E]: shares that sum to what the weights of a token sum to."""
    spec = source.spec
    shares = torch.full((spec.num_experts,), 1 / spec.num_experts, dtype=torch.float64)
    total = spec.scaling * spec.output_scaling
    if mixture != "uniform" or not spec.normalize:
        gates, counts, tokens = _gates(job.stats, position, spec, mixture)
        shares = shares if mixture == "uniform" else counts if mixture == "frequency" else gates
        if not spec.normalize:
            total = float(gates.sum()) / tokens * spec.output_scaling
    return shares / shares.sum() * total


def _gates(
    stats: ExpertStats | None, position: int, spec: LayerSpec, mixture: str
) -> tuple[Tensor, Tensor, int]:
    """Sums of gate weights [E], tokens by expert [E] and all tokens of a layer."""
    if stats is None:
        why = (
            f"mixture={mixture} needs"
            if mixture != "uniform"
            else "raw weights sum to what the router says, so it needs"
        )
        raise UserError(f"{why} --stats, a directory of moekit profile.")
    if len(stats.layers) <= position or stats.layers[position].num_experts != spec.num_experts:
        raise UserError("--stats are those of another model: its layers or experts differ.")
    gates = stats.saliency_sum(position, gate=1)[: spec.num_experts].double()
    counts = stats.counts(position)[: spec.num_experts].double()
    return gates, counts, stats.num_tokens(position)


def _experts(source: ExpertSource) -> list[FFN]:
    found = []
    for number in range(source.spec.num_experts):
        parts: Any = source.views(number)
        if parts.gate is None or parts.gate_bias is not None or parts.down_bias is not None:
            raise UserError(f"{source.spec.path} has experts of another form than a GLU.")
        found.append(FFN(f"expert {number}", parts.gate, parts.up, parts.down))
    return found


def _averaged(experts: Sequence[FFN], shares: Tensor, align: bool) -> FFN:
    """The network whose weights are the mean of the experts' with these shares."""
    weights = (shares / shares.sum()).tolist()
    if align:
        reference = _rows(experts[0])
        experts = [experts[0]] + [
            neurons(expert, match_weights(reference, _rows(expert))) for expert in experts[1:]
        ]
    made = {part: mean([getattr(e, part) for e in experts], weights) for part in PARTS}
    return scaled(FFN("mean of experts", **made), float(shares.sum()))


def _rows(expert: FFN) -> Tensor:
    parts = [getattr(expert, part).read() for part in PARTS]
    return neuron_rows(ExpertWeights(*parts))


def _side_by_side(experts: Sequence[FFN], shares: Tensor, count: int) -> FFN:
    """The network of the neurons of the `count` experts with the largest shares, each weighted."""
    chosen = shares.argsort(descending=True, stable=True)[:count].sort().values.tolist()
    kept = shares[chosen] / shares[chosen].sum() * shares.sum()
    return _joined([scaled(experts[e], float(w)) for e, w in zip(chosen, kept, strict=True)])


def _joined(networks: Sequence[FFN]) -> FFN:
    """The network that adds up the outputs of several: their neurons side by side."""
    gate: Any = torch.cat([network.gate for network in networks])
    up: Any = torch.cat([network.up for network in networks])
    down: Any = torch.cat([network.down for network in networks], dim=1)
    return FFN(networks[0].name, gate, up, down)


def _shared(base: SourceModel, spec: LayerSpec, dense: Dense) -> FFN | None:
    if not dense.shared or not spec.shared_width:
        return None
    prefix = f"{spec.path}.{dense.shared}"
    parts = {part: base.tensors[f"{prefix}.{part}_proj.weight"] for part in PARTS}
    # Its gate is another for every token; without calibration half is the neutral guess, and
    # exact where the gate has zero weights.
    return scaled(FFN("shared", **parts), SIGMOID_OF_ZERO if dense.shared_gate else 1.0)


def _made(
    job: Job,
    dense: Dense,
    sources: Sequence[ExpertSource],
    found: dict[int, FFN],
    start: Start,
) -> Made:
    config = job.base.config
    prefixes = tuple(f"{source.spec.path}." for source in sources)
    tensors = {n: t for n, t in job.base.tensors.items() if not n.startswith(prefixes)}
    kept = {n: t for n, t in tensors.items() if ".mlp." in n}
    width = max(ffn.width for ffn in found.values())
    width = max([width, *(int(t.shape[0]) for n, t in kept.items() if "gate_proj" in n)])
    for name, tensor in kept.items():
        tensors[name] = _padded(tensor, 1 if "down_proj" in name else 0, width)
    for layer, ffn in found.items():
        for part in PARTS:
            name = f"model.layers.{layer}.mlp.{part}_proj.weight"
            tensors[name] = _padded(getattr(ffn, part), 1 if part == "down" else 0, width)
    made = CONFIG_MAPPING[dense.family]
    known = {item.name for item in fields(made)} | {"head_dim"}
    values = {k: v for k, v in config.to_dict().items() if k in known - NOT_COPIED}
    # Where the config of the MoE names none, its class divides; a dense class may have a default.
    values["head_dim"] = values.get("head_dim") or config.hidden_size // config.num_attention_heads
    values.pop("layer_types", None)
    given = {**values, **dense.values, "intermediate_size": width}
    return Made(made(**given), tensors, start)


def _padded(tensor: Deferred, axis: int, width: int) -> Deferred:
    """The tensor with neurons of zeros up to `width`: they add nothing."""
    missing = list(tensor.shape)
    missing[axis] = width - missing[axis]
    if missing[axis] == 0:
        return tensor
    nothing: Any = Deferred(
        tuple(missing),
        tensor.dtype,
        lambda region: torch.zeros([b - a for a, b in region], dtype=tensor.dtype),
    )
    padded: Any = torch.cat([tensor, nothing], dim=axis)
    return padded


def _start(spec: LayerSpec, slices: bool, align: bool) -> Start:
    mixed = "outputs" if slices else "weights"
    return Start.not_equal(
        f"a router mixed {spec.top_k} of {spec.num_experts} experts by the token, and their "
        f"{mixed} are now mixed alike for all. Where all experts are the same it is equal"
        + ("." if slices or align else ", with neurons in one order.")
    )


def _preset(name: str, title: str, paper: str, **more: Any) -> None:
    preset(moe_to_dense, name, title=title, paper=paper, needs=("weights",), **more)


_preset(
    "average",
    "A dense model of the mean of all experts",
    "One Student Knows All Experts Know 2201.10890",
    settings={"slices": 0, "mixture": "uniform"},
)
preset(
    moe_to_dense,
    "frequency-average",
    title="A dense model of the mean of all experts, by how often each was chosen",
    paper="M-SMoE 2310.01334",
    needs=("weights", "data"),
    settings={"slices": 0, "mixture": "frequency"},
)
_preset(
    "side-by-side",
    "A wide dense model of the neurons of experts, each weighted as the router would on average",
    "One Student Knows All Experts Know 2201.10890",
    settings={},
    defaults={"slices": 4},
)
