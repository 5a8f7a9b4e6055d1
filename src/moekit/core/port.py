"""The patched calls of one MoE layer, and what happens inside of them.

See `moekit.core.seam` for the contexts that put handlers here and for their order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moekit.core.forward_context import Phase, Scope, TokenContext, token_context
from moekit.core.layer import MoELayer
from moekit.core.routing_rule import Routing

Backend = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


@dataclass
class SeamCall:
    """One call of a layer's experts, as they receive it.

    hidden [T, D], ids [T, K], weights [T, K]; logits [T, C] where asked for. `router_input` is the
    router's input in the shape it had, and `context` its further arguments: `layer.route(
    call.router_input, **call.context)` repeats the family's rule. Tensors are those of the forward
    itself, with their graph: detach what is kept.
    """

    layer: MoELayer
    hidden: Tensor
    ids: Tensor
    weights: Tensor
    logits: Tensor | None
    router_input: Tensor | None
    context: dict[str, Any]
    tokens: TokenContext

    @property
    def mask(self) -> Tensor | None:
        """[T], False at padding; None when the forward was given no padding mask."""
        return self.tokens.mask

    @property
    def phase(self) -> Phase:
        return self.tokens.phase


@dataclass
class RouterCall:
    """What the router got and returned in the running forward of its block."""

    hidden: Tensor
    context: dict[str, Any]
    logits: Tensor | None
    output: Any


@dataclass(eq=False)
class Handler:
    """What one context manager does at one layer."""

    layer: MoELayer
    scopes: list[tuple[nn.Module, Scope]]
    observe: Callable[[SeamCall], None] | None = None
    wants_logits: bool = False
    edit_logits: Callable[[MoELayer, Tensor, Tensor], Tensor] | None = None
    banned: tuple[int, ...] = ()
    edit_selection: Callable[[MoELayer, Routing, Tensor], Routing] | None = None
    backend: Backend | None = None


class LayerPort:
    """The patched calls of one layer, and the handlers that are active there."""

    def __init__(self, layer: MoELayer):
        self.layer = layer
        self.handlers: list[Handler] = []
        self.router_call: RouterCall | None = None
        # Set while a family replays its block on a selection that was already made.
        self.router_output: Any = None
        self._saved: list[tuple[nn.Module, Any, Any]] = []

    # -- patching --

    def add(self, handler: Handler) -> None:
        """Make a handler active; the first one patches the layer."""
        if not self.handlers:
            self._patch(self.layer.experts, self.layer.call_experts)
            if self.layer.router is not None:
                self._patch(self.layer.router, self.layer.call_router)
        self.handlers.append(handler)

    def remove(self, handler: Handler) -> None:
        """End a handler; the last one leaves the layer as it was."""
        self.handlers.remove(handler)
        if not self.handlers:
            for module, wrapper, earlier in reversed(self._saved):
                _restore(module, wrapper, earlier)
            self._saved.clear()
            self.router_call = None

    def _patch(self, module: nn.Module, call: Callable[..., Any]) -> None:
        earlier = module.__dict__.get("forward")
        forward = module.forward

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return call(forward, args, kwargs, self) if self.handlers else forward(*args, **kwargs)

        module.forward = wrapper
        self._saved.append((module, wrapper, earlier))

    # -- the router --

    @property
    def edits_logits(self) -> bool:
        """Whether the logits of the running call are changed by anybody."""
        return any(h.edit_logits for h in self.handlers)

    def run_router(self, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """Run the router's forward with its logits seen and edited, and keep what it returned."""
        if self.router_output is not None:
            return self.router_output
        names = [name for name, _ in self.layer.router_parameters]
        context = {**dict(zip(names, args, strict=False)), **kwargs}
        hidden = context.pop(names[0])
        logits = None
        if self.edits_logits or any(h.wants_logits for h in self.handlers):
            edit = partial(self.edit, hidden=hidden) if self.edits_logits else None
            with self.layer.tap(edit, self.banned) as tap:
                output = forward(*args, **kwargs)
            logits = tap.logits
            if logits is None:
                raise RuntimeError(f"{self.layer.name}: the router made no logits to see.")
        else:
            output = forward(*args, **kwargs)
        self.router_call = RouterCall(hidden, context, logits, output)
        return output

    def edit(self, logits: Tensor, hidden: Tensor) -> Tensor:
        """Apply every edit to logits [T, C]; `hidden` is the router's input."""
        hidden = hidden.reshape(-1, hidden.shape[-1])
        for handler in self.handlers:
            if handler.edit_logits is not None:
                logits = handler.edit_logits(handler.layer, logits, hidden)
        return logits

    @property
    def banned(self) -> list[int]:
        return sorted({e for h in self.handlers for e in h.banned})

    # -- the experts --

    def dispatch(
        self,
        hidden: Tensor,
        ids: Tensor,
        weights: Tensor,
        native: Callable[[Tensor, Tensor, Tensor], Any],
        pack: Callable[[Tensor], Any] = lambda out: out,
    ) -> Any:
        """Run everything that is active on one call: hidden [T, D], ids and weights [T, K].

        `native(hidden, ids, weights)` is the model's own computation and `pack` brings a backend's
        output [T, D] into the form which `native` returns.
        """
        router, self.router_call = self.router_call, None
        logits = router.logits if router else None
        given = routing = Routing(logits, weights, ids)
        for handler in self.handlers:
            if handler.edit_selection is not None:
                routing = handler.edit_selection(handler.layer, routing, hidden)
        if routing is not given:
            self._check(routing, hidden)
        self._observe(hidden, routing, router)
        backend = next((h.backend for h in reversed(self.handlers) if h.backend), None)
        if backend is not None:
            return pack(backend(self.layer.experts, hidden, routing.ids, routing.weights))
        if routing is given or self.layer.runs_partial_rows:
            return native(hidden, routing.ids, routing.weights)
        return _skip_unused(native, pack, hidden, routing)

    def _observe(self, hidden: Tensor, routing: Routing, router: RouterCall | None) -> None:
        observers = [h for h in self.handlers if h.observe is not None]
        # Inside the backward pass this is a recomputation of a call that was already seen.
        if not observers or torch._C._current_graph_task_id() != -1:
            return
        for handler in observers:
            call = SeamCall(
                handler.layer,
                hidden,
                routing.ids,
                routing.weights,
                routing.logits if handler.wants_logits else None,
                router.hidden if router else None,
                router.context if router else {},
                token_context(handler.scopes, len(hidden)),
            )
            assert handler.observe is not None
            handler.observe(call)

    def _check(self, routing: Routing, hidden: Tensor) -> None:
        ids, weights = routing.ids, routing.weights
        if ids.dim() != 2 or ids.shape != weights.shape or len(ids) != len(hidden):
            raise ValueError(
                f"{self.layer.name}: a routing transform returned ids {list(ids.shape)} and "
                f"weights {list(weights.shape)} for {len(hidden)} tokens."
            )
        if ids.numel() and not -1 <= int(ids.min()) <= int(ids.max()) < self.layer.num_choices:
            raise ValueError(
                f"{self.layer.name}: a routing transform returned ids from {int(ids.min())} to "
                f"{int(ids.max())}; they go from -1 (none) to {self.layer.num_choices - 1}."
            )


def _restore(module: nn.Module, wrapper: Any, earlier: Any) -> None:
    # If somebody wrapped our wrapper meanwhile, it must stay in place; it only passes calls on.
    if module.__dict__.get("forward") is not wrapper:
        return
    if earlier is None:
        del module.forward
    else:
        module.forward = earlier


def _skip_unused(
    native: Callable[[Tensor, Tensor, Tensor], Any],
    pack: Callable[[Tensor], Any],
    hidden: Tensor,
    routing: Routing,
) -> Any:
    """Run the model's own experts without their meeting an id of -1, which they cannot digest.

    Every used choice becomes a row with one choice, so that nothing is computed for an unused one.
    """
    used = routing.ids >= 0
    if bool(used.all()):
        return native(hidden, routing.ids, routing.weights)
    tokens, choices = used.nonzero(as_tuple=True)
    # A sum of low-precision rows is rounded once.
    out = torch.zeros_like(hidden, dtype=torch.promote_types(hidden.dtype, torch.float32))
    if len(tokens):
        ids, weights = routing.ids[tokens, choices], routing.weights[tokens, choices]
        rows = native(hidden[tokens], ids.unsqueeze(1), weights.unsqueeze(1))
        out = out.index_add(0, tokens, rows.to(out.dtype))
    return pack(out.to(hidden.dtype))
