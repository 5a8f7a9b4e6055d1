"""The experts of a layer at training speed, from dense or ragged choices.

Letters: T tokens, K chosen experts, E experts, D width, F expert width, N pairs of token and
expert, H = 2F where gated (the gate first) and F where not.
"""

from typing import Any

import torch
from torch import Tensor

from moekit.core.registry import register
from moekit.ops.lean_experts import LeanExperts

# The name under which transformers and the view find it.
GROUPED = "moekit_grouped"
# What the classes of activations in transformers and torch compute.
_NAMES = {
    "SiLUActivation": "silu",
    "SiLU": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "ReLU": "relu",
    "ReLUSquaredActivation": "relu2",
    "QuickGELUActivation": "quick_gelu",
}


def ragged_experts(
    hidden: Tensor,
    token: Tensor,
    expert: Tensor,
    weight: Tensor,
    up: Tensor,
    down: Tensor,
    *,
    activation: str = "silu",
    gated: bool = True,
) -> Tensor:
    """Sum over pairs of weight * expert(hidden[token]): [T, D] in the dtype of `hidden`.

    Pairs `token`, `expert` (int64) and `weight` [N] in any order, also none; banks `up` [E, H, D]
    and `down` [E, D, F]; `activation` a name of `ops.activations`. For the backward pass only
    `hidden`, the pre-activations and the indices are kept (SonicMoE, arXiv 2512.14080). Under
    autocast the products run in its dtype.
    """
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else up.dtype
    return LeanExperts.apply(
        hidden.to(dtype),
        token,
        expert,
        weight.to(dtype),
        up.to(dtype),
        down.to(dtype),
        activation,
        gated,
    ).to(hidden.dtype)


def grouped_experts(
    hidden: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    activation: str = "silu",
) -> Tensor:
    """`ragged_experts` for tokens that all have K choices, `topk_ids` [T, K].

    Gated, with banks `gate_up` [E, 2F, D] and `down` [E, D, F].
    """
    num_tokens, top_k = topk_ids.shape
    token = torch.arange(num_tokens, device=hidden.device).repeat_interleave(top_k)
    return ragged_experts(
        hidden,
        token,
        topk_ids.reshape(-1),
        topk_weights.reshape(-1),
        gate_up,
        down,
        activation=activation,
    )


@register(
    "backend",
    GROUPED,
    title="Experts one after the other that keep only inputs and pre-activations for training",
    paper="SonicMoE, arXiv:2512.14080",
    limits="Gated, concatenated banks without biases, not transposed, with a plain gate.",
)
def grouped_backend(experts: Any, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
    """`grouped_experts` on the banks of an experts module that `has_plain_banks`."""
    return grouped_experts(
        hidden,
        topk_ids,
        topk_weights,
        experts.gate_up_proj,
        experts.down_proj,
        _NAMES[type(experts.act_fn).__name__],
    )


def has_plain_banks(experts: Any) -> bool:
    """Whether an experts module keeps what `grouped_backend` computes with."""
    gate = getattr(type(experts), "_apply_gate", None)
    return bool(
        getattr(experts, "has_gate", False)
        and getattr(experts, "is_concatenated", False)
        and not getattr(experts, "has_bias", True)
        and not getattr(experts, "is_transposed", True)
        # A class with a gate function of its own may clamp or shift; the default does not.
        and getattr(gate, "__name__", "") == "_default_apply_gate"
        and type(experts.act_fn).__name__ in _NAMES
    )
