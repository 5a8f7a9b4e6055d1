"""Look at the routing, change it, or compute the experts another way, on a model left as it was.

Every function here is a context manager over a `MoEView`. Any number may be active on one model at
once, nested and left in any order. They work by giving the experts module and the router module of
a layer a `forward` of their own on the instance; nothing goes through the config, which models may
share, and when the last context of a layer is left the instance attribute is gone again.

Order at one call: the router runs with the logits edited by every `transform_logits` in the order
of entering; every `transform_routing` changes ids and weights; observers see what the experts are
about to receive; the backend entered last computes, or the model's own experts do.

Gradient checkpointing runs a layer's forward again during the backward pass. Transforms and
backends act there too, since gradients would be wrong otherwise, so they must be pure functions.
Observers are not called again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moekit.core.errors import UserError
from moekit.core.forward_context import scopes_of
from moekit.core.layer import MoELayer
from moekit.core.port import Backend, Handler, LayerPort, SeamCall
from moekit.core.routing_rule import Routing

if TYPE_CHECKING:
    from moekit.core.view import MoEView

# Only layers with an active handler; a port keeps its layer alive.
_ports: dict[nn.Module, LayerPort] = {}


@contextmanager
def observe(
    view: MoEView,
    fn: Callable[[SeamCall], None],
    *,
    logits: bool = False,
    layers: Iterable[int] | None = None,
) -> Iterator[None]:
    """Call `fn` with a `SeamCall` each time experts are called; `layers` are positions in the view.

    Includes padding tokens: use `call.mask`. With `logits` the calls carry router logits.
    """
    with _active(view, layers, lambda layer: {"observe": fn, "wants_logits": logits}):
        yield


@contextmanager
def transform_logits(
    view: MoEView,
    fn: Callable[[MoELayer, Tensor, Tensor], Tensor],
    *,
    layers: Iterable[int] | None = None,
) -> Iterator[None]:
    """Let the router decide on `fn(layer, logits [T, C], hidden [T, D])` by the family's own rule.

    `hidden` is the router's input. A logit of -inf alone does not ban an expert in families that
    add a correction bias for the choice: use `ban_experts`.
    """
    with _active(view, layers, lambda layer: {"edit_logits": fn}):
        yield


@contextmanager
def transform_routing(
    view: MoEView,
    fn: Callable[[MoELayer, Routing, Tensor], Routing],
    *,
    layers: Iterable[int] | None = None,
) -> Iterator[None]:
    """Replace ids and weights by those of `fn(layer, routing, hidden [T, D])` before experts run.

    `fn` returns a new `Routing` (or the given one for no change); K may differ, and an id of -1
    runs nothing. `hidden` is the experts' input. The model's own later use of the router's
    output, as for shared experts, does not change.
    """
    with _active(view, layers, lambda layer: {"edit_selection": fn}):
        yield


@contextmanager
def replace_backend(
    view: MoEView, backend: str | Backend, *, layers: Iterable[int] | None = None
) -> Iterator[None]:
    """Compute the experts by `backend(experts, hidden [T, D], ids, weights [T, K]) -> [T, D]`.

    A name is "naive", "eager" (the family's own loop) or one of transformers' experts functions.
    A function may meet ids of -1 when a routing transform is active.
    """
    with _active(view, layers, lambda layer: {"backend": _named_backend(layer, backend)}):
        yield


@contextmanager
def ban_experts(view: MoEView, experts: dict[int, Iterable[int]] | Iterable[int]) -> Iterator[None]:
    """Keep experts from being chosen; the family's rule picks among the others.

    `experts` are ids for every layer, or ids by position of the layer. Raises UserError when fewer
    than `top_k` would be left. Where a choice cannot be avoided (hash routing by token id), the
    banned choice becomes -1 with weight 0.
    """
    by_layer = (
        {p: sorted(set(ids)) for p, ids in experts.items()}
        if isinstance(experts, dict)
        else dict.fromkeys(range(len(view)), sorted(set(experts)))
    )
    for position, ids in by_layer.items():
        layer = _layers(view, [position])[0]
        if any(not 0 <= e < layer.num_choices for e in ids):
            raise UserError(f"{layer.name} has choices 0 to {layer.num_choices - 1}, not {ids}.")
        if layer.num_choices - len(ids) < layer.top_k:
            raise UserError(
                f"{layer.name}: banning {len(ids)} of {layer.num_choices} experts leaves fewer "
                f"than the {layer.top_k} which the router picks."
            )

    def handler(layer: MoELayer) -> dict[str, Any]:
        banned = torch.tensor(by_layer[layer.position], dtype=torch.long)
        return {
            "edit_logits": lambda _, logits, __: logits.index_fill(
                -1, banned.to(logits.device), float("-inf")
            ),
            "banned": tuple(banned.tolist()),
            "edit_selection": lambda _, routing, __: _drop(routing, banned),
        }

    with _active(view, [p for p, ids in by_layer.items() if ids], handler):
        yield


def _drop(routing: Routing, banned: Tensor) -> Routing:
    hit = torch.isin(routing.ids, banned.to(routing.ids.device))
    if not bool(hit.any()):
        return routing
    return Routing(
        routing.logits, routing.weights.masked_fill(hit, 0), routing.ids.masked_fill(hit, -1)
    )


def _named_backend(layer: MoELayer, backend: str | Backend) -> Backend:
    if not isinstance(backend, str):
        return backend
    if backend == "naive":
        return lambda _, hidden, ids, weights: layer.run_naive(hidden, ids, weights)
    forward = type(layer.experts).forward
    eager = getattr(forward, "__wrapped__", None)
    if eager is None:
        raise UserError(
            f"{layer.name}: {type(layer.experts).__name__} takes no experts backend by name; "
            "use 'naive' or a function."
        )
    if backend == "eager":
        return eager
    if backend not in ALL_EXPERTS_FUNCTIONS:
        names = ", ".join(["naive", "eager", *ALL_EXPERTS_FUNCTIONS.keys()])
        raise UserError(f"unknown experts backend {backend!r}; choose from {names}.")
    return ALL_EXPERTS_FUNCTIONS[backend]


def _layers(view: MoEView, positions: Iterable[int] | None) -> list[MoELayer]:
    if positions is None:
        return list(view)
    chosen = []
    for position in positions:
        if not 0 <= position < len(view):
            raise UserError(f"the model has MoE layers 0 to {len(view) - 1}, not {position}.")
        chosen.append(view[position])
    return chosen


@contextmanager
def _active(
    view: MoEView,
    positions: Iterable[int] | None,
    handler_of: Callable[[MoELayer], dict[str, Any]],
) -> Iterator[None]:
    with ExitStack() as stack:
        for layer in _layers(view, positions):
            scopes = scopes_of(view.model, layer.name)
            handler = Handler(layer, scopes, **handler_of(layer))
            for module, scope in scopes:
                scope.acquire(module)
                stack.callback(scope.release)
            _ports.setdefault(layer.experts, LayerPort(layer)).add(handler)
            stack.callback(_remove, handler)
        yield


def _remove(handler: Handler) -> None:
    port = _ports[handler.layer.experts]
    port.remove(handler)
    if not port.handlers:
        del _ports[handler.layer.experts]
