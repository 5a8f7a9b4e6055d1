"""Running a router's own forward on edited logits, so that every family keeps its own rule.

Shapes: T tokens, D width, C choices (the experts, and skip or identity choices where a family has
them), K chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

PRODUCTS = {"linear", "mm", "matmul", "__matmul__"}
BIAS_MARGIN = 4.0


@dataclass
class Routing:
    """What a router decided: logits [T, C], weights [T, K] and ids [T, K] of the chosen experts.

    `logits` are the result of the router's product, before any scaling, capping or bias. Ids are
    int64; -1 with weight 0 where a token uses fewer than K.
    """

    logits: Tensor | None
    weights: Tensor
    ids: Tensor


class RouterTap(TorchFunctionMode):
    """Sees the logits appear while a router's forward runs, and may put others in their place.

    The logits are the first product with `weight`, or with a cast or transposed copy of it. `edit`
    maps logits [T, C] to logits [T, C]. Choices in `banned` get a correction bias below every other
    one, since families that choose by score plus bias could otherwise still take them.
    """

    def __init__(
        self,
        weight: Tensor,
        num_choices: int,
        edit: Callable[[Tensor], Tensor] | None = None,
        correction_bias: Tensor | None = None,
        banned: Iterable[int] = (),
    ):
        super().__init__()
        self.logits: Tensor | None = None
        self._copies = [weight]
        self._num_choices = num_choices
        self._edit = edit
        self._bias, self._lowered = correction_bias, None
        banned = list(banned)
        if correction_bias is not None and banned:
            self._lowered = lower_bias(correction_bias, banned)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._lowered is not None:
            args = tuple(self._lowered if a is self._bias else a for a in args)
        out = func(*args, **kwargs)
        if not isinstance(out, Tensor) or not any(_among(a, self._copies) for a in args):
            return out
        if getattr(func, "__name__", "") not in PRODUCTS:
            self._copies.append(out)
        elif self.logits is None:
            out = self._replace(out)
        return out

    def _replace(self, out: Tensor) -> Tensor:
        flat = out.reshape(-1, out.shape[-1])
        logits = flat[:, : self._num_choices]
        if self._edit is not None:
            edited = self._edit(logits)
            if edited.shape != logits.shape:
                raise ValueError(
                    f"edited logits are {list(edited.shape)}, expected {list(logits.shape)}"
                )
            logits = edited.to(out.dtype)
            # Inkling's router makes the logits of its shared experts in the same product.
            out = torch.cat([logits, flat[:, self._num_choices :]], dim=-1).view(out.shape)
        self.logits = logits
        return out


def lower_bias(bias: Tensor, banned: list[int]) -> Tensor:
    """Return a copy of a correction bias [C] in which the banned choices come last.

    Finite on purpose: -inf would make every group that holds a banned expert equally bad. Scores of
    families with a correction bias lie in [0, 1], so a margin above 1 decides.
    """
    lowered = bias.detach().clone()
    lowered.view(-1)[banned] = bias.min().detach() - BIAS_MARGIN
    return lowered


def _among(value: Any, tensors: list[Tensor]) -> bool:
    return any(value is t for t in tensors)


def router_matrix(router: nn.Module, num_experts: int) -> tuple[nn.Module, str] | None:
    """Find the parameter whose product gives the logits: the last matrix with a row an expert.

    Returns its module and its name there, or None.
    """
    found = None
    for module in router.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 2 and parameter.shape[0] >= num_experts:
                found = module, name
    return found


def correction_bias(router: nn.Module, block: nn.Module, sizes: set[int]) -> Tensor | None:
    """Find the bias that is added for the choice only: in the router, or in the block beside it."""
    tensors = [*_tensors(router, recurse=True), *_tensors(block, recurse=False)]
    for name, tensor in tensors:
        leaf = name.rpartition(".")[2]
        if leaf != "bias" and leaf.endswith(("bias", "biases")) and tensor.numel() in sizes:
            return tensor
    return None


def _tensors(module: nn.Module, recurse: bool) -> Iterable[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=recurse)
    yield from module.named_buffers(recurse=recurse)
