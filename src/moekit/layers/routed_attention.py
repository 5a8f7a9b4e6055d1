"""Attention made of experts: ModuleFormer's modules, and heads that take part of the tokens.

A routed attention stands in a block in place of self-attention. Its record has the round
`ATTENTION_ROUND`, which also keeps its random draws apart from those of the block's MoE layer. None
has a key-value cache.

Shapes: B sequences, S positions, T = B * S tokens, D width, E attention experts, K chosen, N pairs,
H heads, A head width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moekit.core.errors import UserError
from moekit.core.registry import register, registry
from moekit.ops.stick_breaking import stick_breaking_attention

from .build import build_router, checked
from .compute import grouped_linear
from .context import RouterContext
from .routing import Routing

# The round of an attention's decision: before the first of the block's MoE layer.
ATTENTION_ROUND = -1


class RoutedAttention(nn.Module):
    """A router and attention experts; subclasses say how the experts attend."""

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.router: Any = router

    @property
    def causal(self) -> bool:
        return self.router.causal

    @property
    def sees_batch(self) -> bool:
        return self.router.sees_batch

    def forward(self, hidden: Tensor, context: RouterContext) -> tuple[Tensor, None]:
        """`hidden` [B, S, D] attended, and no attention weights, as transformers' modules return.

        The routing is appended to `context.records`.
        """
        flat = hidden.flatten(0, 1)
        routing = self.router(flat, dataclasses.replace(context, round=ATTENTION_ROUND, cost=None))
        # Routers of the pipeline take the round over from the context; others need not.
        routing = dataclasses.replace(routing, round=ATTENTION_ROUND)
        context.records.append(routing)
        return self.attend(flat, routing, context).view_as(hidden), None

    def attend(self, hidden: Tensor, routing: Routing, context: RouterContext) -> Tensor:
        """What the experts of `routing` make of `hidden` [T, D]: [T, D]."""
        raise NotImplementedError

    def after_step(self, counts: Tensor, round: int = ATTENTION_ROUND) -> None:
        """Tell the router the pairs of each expert [E] in the last step, over all processes."""
        self.router.after_step(counts)


@register(
    "attention",
    "stick-breaking",
    title="Modules with queries and outputs of their own over common keys and values",
    paper="ModuleFormer, arXiv:2306.04640",
    needs=("training",),
    limits="Every token needs the same number of modules; no key-value cache; S * S memory.",
    options={"head_width": "width A of a head", "heads": "heads of a module"},
)
class ModuleAttention(RoutedAttention):
    """Each token's K modules attend with stick-breaking weights; outputs are summed by weight.

    `query` [E, H * A, D] and `output` [E, D, H * A] are a module's own, `key` and `value`
    [H * A, D] common. No encoding of positions is needed.
    """

    def __init__(
        self, router: nn.Module, width: int, count: int, *, head_width: int, heads: int = 1
    ) -> None:
        super().__init__(router)
        inner = heads * head_width
        if inner < 8 or inner % 8:
            raise UserError(f"heads {heads} * head_width {head_width} is not a multiple of 8")
        self.heads = heads
        self.query = nn.Parameter(torch.empty(count, inner, width))
        self.output = nn.Parameter(torch.empty(count, width, inner))
        self.key = nn.Parameter(torch.empty(inner, width))
        self.value = nn.Parameter(torch.empty(inner, width))
        self.init_weights_with(0.02)

    def init_weights_with(self, std: float) -> None:
        for weight in (self.query, self.output, self.key, self.value):
            nn.init.normal_(weight, std=std)

    def attend(self, hidden: Tensor, routing: Routing, context: RouterContext) -> Tensor:
        if routing.top_k is None:
            raise UserError(
                "attention stick-breaking needs a router that gives every token as many modules"
            )
        batch, length = context.batch, context.length
        top_k = routing.top_k
        query = pair_linear(hidden[routing.token], routing.expert, self.query)
        # Choices of a token stand beside one another as heads do: [B, K * H, S, A].
        query = query.view(batch, length, top_k * self.heads, -1).transpose(1, 2)
        key, value = (
            F.linear(hidden, weight)
            .view(batch, length, self.heads, -1)
            .transpose(1, 2)
            .repeat(1, top_k, 1, 1)
            for weight in (self.key, self.value)
        )
        mask = context.token_mask
        mask = None if mask is None else mask.view(batch, length)
        attended = stick_breaking_attention(query, key, value, mask).transpose(1, 2)
        rows = attended.reshape(len(routing.token), -1)
        out = pair_linear(rows, routing.expert, self.output)
        out = out * routing.weight.to(out.dtype)[:, None]
        return out.view(len(hidden), top_k, -1).sum(1).to(hidden.dtype)


@register(
    "attention",
    "heads",
    title="Every head attends among the tokens that chose it",
    paper="Union of Experts, arXiv:2503.02495",
    needs=("training",),
    limits="No key-value cache.",
    options={
        "head_width": "width A of a head; None: the model's width over the heads",
        "theta": "base of the rotary positions",
    },
)
class HeadAttention(RoutedAttention):
    """Multi-head attention whose heads each see only the tokens routed to them.

    A head's tokens stand close together, also for its rotary positions; what it gives is multiplied
    by the token's weight. With every head chosen by every token with weight 1 this is ordinary
    causal attention. `query`, `key` and `value` [E, A, D], `output` [E, D, A].
    """

    query: nn.Parameter
    key: nn.Parameter
    value: nn.Parameter

    def __init__(
        self,
        router: nn.Module,
        width: int,
        count: int,
        *,
        head_width: int | None = None,
        theta: float = 1e4,
    ) -> None:
        super().__init__(router)
        head = width // count if head_width is None else head_width
        if head < 2 or head % 2:
            raise UserError(f"head_width {head} is not even, which rotary positions need")
        self.theta = theta
        for name in ("query", "key", "value"):
            self.register_parameter(name, nn.Parameter(torch.empty(count, head, width)))
        self.output = nn.Parameter(torch.empty(count, width, head))
        self.init_weights_with(0.02)

    def init_weights_with(self, std: float) -> None:
        for weight in self.parameters(recurse=False):
            nn.init.normal_(weight, std=std)

    def attend(self, hidden: Tensor, routing: Routing, context: RouterContext) -> Tensor:
        rows, real, weight = gather_by_head(routing, context)
        inputs = hidden[rows]
        query, key, value = (
            torch.einsum("bhcd,had->bhca", inputs, part)
            for part in (self.query, self.key, self.value)
        )
        query, key = rotate(query, self.theta), rotate(key, self.theta)
        # Rows without a token come last, so that causality hides them from the others.
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        out = torch.einsum("bhca,hda->bhcd", attended, self.output)
        out = (out * weight.to(out.dtype)[..., None])[real]
        return (
            torch.zeros_like(hidden, dtype=out.dtype).index_add(0, rows[real], out).to(hidden.dtype)
        )


def gather_by_head(routing: Routing, context: RouterContext) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens of every sequence and head in order, padded to the longest list of C.

    Returns tokens [B, E, C] (0 where there is none), which of them are real, and weights, each
    [B, E, C]. Padding of the batch is left out.
    """
    token, expert, weight = routing.pairs
    if routing.token_mask is not None:
        own = routing.token_mask[token]
        token, expert, weight = token[own], expert[own], weight[own]
    lists = context.batch * routing.num_experts
    owner = token // context.length * routing.num_experts + expert
    order = torch.argsort(owner, stable=True)
    owner, token, weight = owner[order], token[order], weight[order]
    counts = torch.bincount(owner, minlength=lists)
    place = torch.arange(len(owner), device=owner.device) - (counts.cumsum(0) - counts)[owner]
    longest = max(1, int(counts.max())) if lists else 1
    shape = (context.batch, routing.num_experts, longest)
    slot = owner * longest + place
    rows = token.new_zeros(lists * longest).index_copy(0, slot, token)
    real = torch.zeros(lists * longest, dtype=torch.bool, device=token.device)
    real = real.index_fill(0, slot, True)
    weights = weight.new_zeros(lists * longest).index_copy(0, slot, weight)
    return rows.view(shape), real.view(shape), weights.view(shape)


def rotate(values: Tensor, theta: float) -> Tensor:
    """Rotary positions 0, 1, ... on the rows of `values` [..., C, A], halves paired."""
    half = values.shape[-1] // 2
    place = torch.arange(values.shape[-2], device=values.device, dtype=torch.float32)
    speed = theta ** (-torch.arange(half, device=values.device, dtype=torch.float32) / half)
    angle = place[:, None] * speed
    first, second = values.float().chunk(2, -1)
    cos, sin = angle.cos(), angle.sin()
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    return turned.to(values.dtype)


def pair_linear(rows: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
    """Row n of `rows` [N, I] times the matrix [E, O, I] of its expert: [N, O]."""
    order = torch.argsort(expert, stable=True)
    ends = torch.bincount(expert, minlength=len(weight)).cumsum(0).to(torch.int32)
    made = grouped_linear(rows[order], weight, ends)
    return torch.empty_like(made).index_copy(0, order, made)


_KEYS = ("type", "count", "top_k", "router")


def build_attention(width: int, recipe: Mapping[str, Any]) -> RoutedAttention:
    """The routed attention of `recipe`: type, count, top_k, router, and options of the type.

    Raises UserError for what is missing and for what its parts refuse.
    """
    missing = [key for key in _KEYS if key not in recipe]
    if missing:
        raise UserError(f"moe_attention has no {', '.join(missing)}")
    options = {key: value for key, value in recipe.items() if key not in _KEYS}
    router = recipe["router"]
    named = {"name": router} if isinstance(router, str) else dict(router)
    method = registry.find(recipe["type"], kind="attention")
    code = checked(method, options)
    made = build_router(width=width, num_experts=recipe["count"], top_k=recipe["top_k"], **named)
    return code(made, width, recipe["count"], **options)
