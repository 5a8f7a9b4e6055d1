"""What only the model's forward knows and the seam cannot see: batch shape, padding, phase.

Hooks on the model and on the models inside of it note the arguments of each running forward.
"""

from __future__ import annotations

import inspect
import itertools
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

Phase = Literal["prefill", "decode"]
_forward_ids = itertools.count()


@dataclass(eq=False)
class RunningForward:
    """The arguments of one forward that matter to a trace. B sequences of S tokens each.

    `mask` [B, S] is the padding mask of these tokens. Where the forward got a ready-made attention
    mask, `self_attending` [B, S] tells which tokens may see themselves, which padding may not.
    """

    forward_id: int
    batch_shape: tuple[int, int] | None
    mask: Tensor | None
    self_attending: Tensor | None
    input_ids: Tensor | None
    past_length: int


@dataclass
class TokenContext:
    """The tokens of one call at the seam, or defaults where the call is not inside of a forward.

    `mask` [T] is False at padding and None when nothing is padded; `input_ids` [T]; `batch_shape`
    is (B, S) with B * S = T; `past_length` counts the tokens already in the cache.
    """

    forward_id: int = -1
    mask: Tensor | None = None
    input_ids: Tensor | None = None
    batch_shape: tuple[int, int] | None = None
    past_length: int = 0

    @property
    def phase(self) -> Phase:
        """ "decode" for a single token after cached ones, else "prefill"."""
        one = self.batch_shape is not None and self.batch_shape[1] == 1
        return "decode" if one and self.past_length > 0 else "prefill"


class Scope:
    """The running forwards of one model, noted by hooks while anybody asks for them."""

    def __init__(self, module: nn.Module):
        self.running: list[RunningForward] = []
        self._signature = inspect.signature(type(module).forward)
        self._users = 0
        self._handles: list[Any] = []

    def acquire(self, module: nn.Module) -> None:
        self._users += 1
        if self._users == 1:
            self._handles = [
                module.register_forward_pre_hook(self._enter, with_kwargs=True),
                module.register_forward_hook(self._leave, always_call=True),
            ]

    def release(self) -> None:
        self._users -= 1
        if self._users == 0:
            for handle in self._handles:
                handle.remove()
            self.running.clear()

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        arguments = {**self._signature.bind_partial(module, *args).arguments, **kwargs}
        names = self._signature.parameters
        decoder_only = "decoder_input_ids" in names and "input_ids" not in names
        prefix = "decoder_" if decoder_only else ""
        # An encoder-decoder's input_ids are the encoder's; its two stacks are models of their own.
        two_streams = {"input_ids", "decoder_input_ids"} <= names.keys()
        self.running.append(_read(arguments, prefix, two_streams))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.running:
            self.running.pop()


_scopes: WeakKeyDictionary[nn.Module, Scope] = WeakKeyDictionary()


def scopes_of(model: nn.Module, path: str) -> list[tuple[nn.Module, Scope]]:
    """List the models that enclose the module at `path`, the nearest first, `model` last."""
    enclosing = [model]
    module = model
    for part in filter(None, path.split(".")):
        module = getattr(module, part)
        if isinstance(module, PreTrainedModel):
            enclosing.append(module)
    for scoped in enclosing:
        if scoped not in _scopes:
            _scopes[scoped] = Scope(scoped)
    return [(scoped, _scopes[scoped]) for scoped in reversed(enclosing)]


def token_context(scopes: list[tuple[nn.Module, Scope]], num_tokens: int) -> TokenContext:
    """Gather what the running forwards know about `num_tokens` tokens at the seam.

    An inner model may be given embeddings and a ready-made attention mask where the outer one got
    token ids and the padding mask, so outer models are asked as long as their batch is the same.
    """
    context = TokenContext()
    self_attending = None
    for _, scope in scopes:
        forward = scope.running[-1] if scope.running else None
        if forward is None or forward.batch_shape is None:
            break
        batch, length = forward.batch_shape
        if batch * length != num_tokens or context.batch_shape not in (None, forward.batch_shape):
            break
        if context.batch_shape is None:
            context.batch_shape = forward.batch_shape
            context.forward_id = forward.forward_id
        context.past_length = max(context.past_length, forward.past_length)
        if context.input_ids is None and forward.input_ids is not None:
            context.input_ids = forward.input_ids.reshape(-1)
        if context.mask is None and forward.mask is not None:
            context.mask = forward.mask.reshape(-1)
        if self_attending is None and forward.self_attending is not None:
            self_attending = forward.self_attending.reshape(-1)
    if context.mask is None:
        context.mask = self_attending
    return context


def _read(arguments: dict[str, Any], prefix: str, two_streams: bool) -> RunningForward:
    ids = arguments.get(f"{prefix}input_ids")
    embeds = arguments.get(f"{prefix}inputs_embeds")
    shape = None
    if not two_streams:
        if isinstance(ids, Tensor) and ids.dim() == 2:
            shape = (ids.shape[0], ids.shape[1])
        elif isinstance(embeds, Tensor) and embeds.dim() == 3:
            shape = (embeds.shape[0], embeds.shape[1])
    past = _past_length(arguments)
    mask = arguments.get(f"{prefix}attention_mask")
    if isinstance(mask, dict):
        mask = mask.get("full_attention")
    padding, self_attending = None, None
    if shape is not None and isinstance(mask, Tensor):
        if mask.dim() == 2 and mask.shape[1] >= shape[1]:
            # With a cache the mask also covers the past; its last columns are this step's tokens.
            padding = mask[:, -shape[1] :].bool()
        elif mask.dim() == 4 and mask.shape[-1] >= past + shape[1]:
            self_attending = _diagonal(mask, past).expand(shape)
    return RunningForward(
        next(_forward_ids), shape, padding, self_attending, ids if shape else None, past
    )


def _diagonal(mask: Tensor, past: int) -> Tensor:
    """Return [B, S]: whether each of S tokens sees itself, in an attention mask [B, 1, S, L]."""
    own = mask[:, 0].diagonal(offset=past, dim1=-2, dim2=-1)
    return own if own.dtype == torch.bool else own == 0


def _past_length(arguments: dict[str, Any]) -> int:
    cache = arguments.get("past_key_values")
    return int(cache.get_seq_length()) if cache is not None else 0
