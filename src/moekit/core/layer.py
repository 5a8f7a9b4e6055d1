"""A handle on one MoE layer: its experts in one orientation, and its router's own rule.

Shapes: T tokens, D width, F expert width, E experts, C choices, K chosen. C is E plus the choices
that run no expert (skip, identity) where a family has them.

The families of `moekit.families` subclass `MoELayer`. What they override is listed in its second
half: how the calls of the model's own modules translate to hidden, ids and weights.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moekit.core.errors import UserError
from moekit.core.expert_weights import ExpertWeights, bank_views, copy_into
from moekit.core.routing_rule import RouterTap, Routing, correction_bias, router_matrix
from moekit.ops.experts_naive import naive_combine, run_expert

if TYPE_CHECKING:
    from moekit.core.find import MoESite
    from moekit.core.port import LayerPort

TOP_K_FIELDS = ("num_experts_per_tok", "top_k_experts", "moe_topk")


class MoELayer:
    """One MoE layer of a loaded model.

    `position` counts MoE layers, `index` is the decoder layer (of its stack), `name` the path of
    the block. `num_choices` exceeds `num_experts` where the router may also choose to skip.
    """

    # Where a family is found and named; `experts_name` is empty where the block itself computes.
    experts_name = "experts"
    router_name: str | None = "router"
    shared_names: tuple[str, ...] = ()
    # Whether the family's own experts accept ids of -1.
    runs_partial_rows = False
    # Whether a token's routing depends on the other tokens of the same forward.
    mixes_tokens = False

    # The modules of the model's own family; what they have differs by family.
    block: Any
    experts: Any
    router: Any

    def __init__(self, site: MoESite, position: int):
        self.position = position
        self.index = site.layer_index
        self.name = site.path
        self.block = site.block
        self.experts = site.experts
        self.router = site.router
        self.shared = dict(site.shared)
        self.num_experts = self._count_experts()
        self._matrix: tuple[nn.Module, str] | None = None
        if self.router is not None:
            self._matrix = router_matrix(self.router, self.num_experts)
        self.top_k = self._find_top_k()
        bias = self.correction_bias
        weight = self.router_weight
        rows = weight.shape[0] if weight is not None else self.num_experts
        # Rows beyond the bias belong to shared experts, which nobody chooses (inkling).
        self.num_choices = rows if bias is None else bias.numel()

    def __repr__(self) -> str:
        return f"MoELayer({self.name}, {self.num_experts} experts, top {self.top_k})"

    # -- experts --

    def get_expert(self, e: int) -> ExpertWeights:
        """Return a copy of expert `e`: gate and up [F, D], down [D, F] and their biases."""
        return self.expert_views(self._checked(e)).clone()

    def set_expert(self, e: int, expert: ExpertWeights) -> None:
        """Overwrite expert `e`; raises UserError when the parts or shapes differ."""
        copy_into(self.expert_views(self._checked(e)), expert, f"{self.name} expert {e}")

    def run_expert(self, e: int, hidden: Tensor, weight: Tensor | None = None) -> Tensor:
        """Run expert `e` on hidden [n, D]; with `weight` [n, 1] or scalar, weighted as here."""
        out = run_expert(self.experts, e, hidden)
        return out if weight is None else out * weight

    def run_naive(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Compute the layer's routed output [T, D] by a double loop over tokens and choices."""
        return naive_combine(self.run_expert, hidden, ids, weights)

    # -- router --

    @property
    def router_weight(self) -> nn.Parameter | None:
        """The matrix [C, .] whose product gives the logits; None where there is no such matrix."""
        return getattr(*self._matrix) if self._matrix else None

    @property
    def router_bias(self) -> nn.Parameter | None:
        """The bias [C] that is part of the logits."""
        return getattr(self._matrix[0], "bias", None) if self._matrix else None

    @property
    def correction_bias(self) -> Tensor | None:
        """The bias [C] that counts for the choice and not for the weights (a view, writable)."""
        if self.router is None or self.router_weight is None:
            return None
        sizes = {self.num_experts, self.router_weight.shape[0]}
        bias = correction_bias(self.router, self.block, sizes)
        return None if bias is None else bias.view(-1)

    def route(self, hidden: Tensor, **context: Any) -> Routing:
        """Apply the family's routing rule to the router's input, hidden [T, D] or [B, S, D].

        `context` holds further arguments of the router's forward that the block does not know, by
        name: `input_ids` for hash routing, `router_states` for zaya. Raises UserError when one
        without a default is missing. Ids and weights are [T, K].
        """
        return self._route(hidden, context, edit=None)

    def route_from_logits(
        self,
        logits: Tensor,
        hidden: Tensor | None = None,
        banned: Iterable[int] = (),
        **context: Any,
    ) -> Routing:
        """Apply the family's routing rule to given logits [T, C].

        `hidden` matters only where the rule reads more than the logits (inkling's shared experts).
        Choices in `banned` lose to all others, as under `seam.ban_experts`.
        """
        if hidden is None:
            hidden = torch.zeros(
                len(logits), self.router_width, dtype=self.dtype, device=logits.device
            )
        banned = list(banned)
        if banned:
            gone = torch.tensor(banned, device=logits.device)
            logits = logits.index_fill(-1, gone, float("-inf"))
        return self._route(hidden, context, lambda _: logits, banned)

    def _route(
        self,
        hidden: Tensor,
        context: dict[str, Any],
        edit: Callable[[Tensor], Tensor] | None,
        banned: Iterable[int] = (),
    ) -> Routing:
        router = self._need_router()
        arguments = self._router_arguments(context)
        tap = self.tap(edit, banned)
        # The class's forward: the instance's may be patched by the seam, and this is the plain rule
        forward = type(router).forward
        with tap:
            try:
                output = forward(router, hidden, **arguments)
            except (ValueError, IndexError):
                # Some routers insist on a batch dimension (afmoe, zaya).
                if hidden.dim() == 3:
                    raise
                tap.logits = None
                output = forward(router, hidden.unsqueeze(0), **arguments)
        weights, ids = self.read_router(output)
        return Routing(tap.logits, weights, ids)

    def _router_arguments(self, context: dict[str, Any]) -> dict[str, Any]:
        arguments = {}
        for name, parameter in self.router_parameters[1:]:
            if name in context:
                arguments[name] = context[name]
            elif isinstance(getattr(self.block, name, None), Tensor):
                arguments[name] = getattr(self.block, name)
            elif parameter.default is inspect.Parameter.empty:
                raise UserError(
                    f"{self.name}: the router also needs {name!r}; give it as route(..., {name}=)"
                )
        return arguments

    @cached_property
    def router_parameters(self) -> list[tuple[str, inspect.Parameter]]:
        """The parameters of the router's forward, without self."""
        return list(inspect.signature(type(self.router).forward).parameters.items())[1:]

    def tap(
        self, edit: Callable[[Tensor], Tensor] | None = None, banned: Iterable[int] = ()
    ) -> RouterTap:
        """Make a tap for one run of the router; see `RouterTap`."""
        weight = self.router_weight
        if weight is None:
            raise UserError(f"{self.name}: no router weight found, so its logits are unknown.")
        bias = correction_bias(self._need_router(), self.block, {self.num_experts, weight.shape[0]})
        return RouterTap(weight, self.num_choices, edit, bias, banned)

    @property
    def router_width(self) -> int:
        """D, the width of the router's input."""
        return next(p.shape[1] for p in self._need_router().parameters() if p.dim() == 2)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the experts."""
        return next(self.experts.parameters()).dtype

    def _need_router(self) -> nn.Module:
        if self.router is None:
            raise UserError(f"{self.name} has no router.")
        return self.router

    def _checked(self, e: int) -> int:
        if not 0 <= e < self.num_experts:
            raise UserError(f"{self.name} has experts 0 to {self.num_experts - 1}, not {e}.")
        return e

    # -- what a family may override --

    @classmethod
    def matches(cls, block: nn.Module) -> bool:
        """Whether `block` is an MoE block of this family (asked of every module of a model)."""
        return False

    def expert_views(self, e: int) -> ExpertWeights:
        """Return expert `e` as writable views in canonical orientation."""
        return bank_views(self.experts, e)

    def _count_experts(self) -> int:
        return self.experts.down_proj.shape[0]

    def _find_top_k(self) -> int:
        for owner in (self.router, self.block):
            if isinstance(getattr(owner, "top_k", None), int):
                return owner.top_k
        config = getattr(self.router, "config", None) or self.experts.config
        return next(getattr(config, f) for f in TOP_K_FIELDS if hasattr(config, f))

    def read_router(self, output: Any) -> tuple[Tensor, Tensor]:
        """Return weights and ids, both [T, K], out of what the router's forward returned."""
        _, weights, ids, *_ = output
        return weights.reshape(-1, weights.shape[-1]), ids.reshape(-1, ids.shape[-1])

    def call_router(
        self, forward: Callable[..., Any], args: tuple, kwargs: dict, port: LayerPort
    ) -> Any:
        """Run the router's forward for the seam, with its logits seen and edited."""
        return port.run_router(forward, args, kwargs)

    def call_experts(
        self, forward: Callable[..., Any], args: tuple, kwargs: dict, port: LayerPort
    ) -> Any:
        """Run the experts' forward for the seam: translate the call and hand it to `dispatch`."""
        if kwargs:
            names = list(inspect.signature(type(self.experts).forward).parameters)[1:]
            args = (*args, *(kwargs[name] for name in names[len(args) :]))
        hidden, ids, weights = args
        return port.dispatch(hidden, ids, weights, forward)
