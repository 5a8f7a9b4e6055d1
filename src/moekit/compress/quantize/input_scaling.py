"""Scaling the input channels of a layer's experts without changing what the model computes.

Dividing the norm before a block by s and multiplying by s the columns of every matrix that reads
its output leaves each product as it was: AWQ and EAQuant choose s so that experts lose less when
they are rounded. Which matrices those are is found by running the model on the meta device, where
nothing is computed: every use of the norm's output must be a product with a parameter.

Shapes: D width of the experts' input, F expert width.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PretrainedConfig, PreTrainedModel

from moekit.core.architecture import meta_model
from moekit.core.errors import UserError
from moekit.core.find import MoESite, find_moe
from moekit.core.spec import spec_of

# Tokens of the traced forward; none of them is computed.
TRACED = 8
_COPIES = {torch.ops.aten._to_copy, torch.ops.aten.clone}
# What only looks at the shape.
_SHAPED = {torch.ops.aten.empty_like, torch.ops.aten.zeros_like, torch.ops.aten.new_zeros}
# Position of the factor that is scaled; the other one is the next.
_PRODUCTS = {torch.ops.aten.mm: 0, torch.ops.aten.bmm: 0, torch.ops.aten.addmm: 1}


@dataclass(frozen=True)
class InputScaling:
    """What changes along with the input of a layer's experts.

    `norm` is the path of the norm, whose weight counts from zero if `zero_centred`; `matrices` are
    the parameters [out, D] that read its output beside the experts: router, shared experts.
    """

    layer: int
    norm: str
    zero_centred: bool
    matrices: tuple[str, ...]

    def norm_values(self, scale: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The norm's parameters, out of `tensors` by name, divided by `scale` [D]."""
        shift = 1.0 if self.zero_centred else 0.0
        made = {}
        for part, offset in (("weight", shift), ("bias", 0.0)):
            name = f"{self.norm}.{part}"
            if name in tensors:
                old = tensors[name]
                made[name] = ((old.float() + offset) / scale - offset).to(old.dtype)
        return made

    def exact_scale(self, scale: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """The scale that the norm's weight, rounded to its number format, really divides by."""
        name = f"{self.norm}.weight"
        shift = 1.0 if self.zero_centred else 0.0
        old = tensors[name].float() + shift
        new = self.norm_values(scale, tensors)[name].float() + shift
        return torch.where((new == 0) | (old == 0), scale, old / new)

    def matrix_values(self, scale: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The matrices beside the experts with their columns times `scale` [D]."""
        return {
            name: (tensors[name].float() * scale).to(tensors[name].dtype) for name in self.matrices
        }


def input_scalings(config: PretrainedConfig) -> dict[int, InputScaling]:
    """Decoder layer -> how the input of its experts can be scaled, for every MoE layer.

    Raises `UserError`, naming the family and the reason, for a model in which some layer's cannot:
    no norm before the experts, or a use of its output other than a product with a parameter.
    """
    model = meta_model(config)
    spec = spec_of(model, config)
    sites = find_moe(model)
    found = _trace(model, sites, spec.model_type)
    made = {}
    for site, layer in zip(sites, spec.per_layer, strict=True):
        use = found.get(site.experts_path)
        where = f"{spec.model_type}, layer {layer.layer_index}"
        if use is None or layer.scales_input:
            raise UserError(
                f"{where}: no norm hands its output to the experts as it is, so their input "
                "channels cannot be scaled; take rtn or gptq."
            )
        if use.others:
            raise UserError(
                f"{where}: the output of {use.norm} is also used by {', '.join(use.others)}, so "
                "the input channels of its experts cannot be scaled; take rtn or gptq."
            )
        made[layer.layer_index] = InputScaling(
            layer.layer_index,
            use.norm,
            _is_zero_centred(model.get_submodule(use.norm), where),
            tuple(sorted(use.matrices)),
        )
    return made


@dataclass
class _Use:
    """The uses of one norm's output."""

    norm: str
    matrices: set[str] = field(default_factory=set)
    others: list[str] = field(default_factory=list)


class _Watch(TorchDispatchMode):
    """Follows outputs of norms, and parameters, through copies and views by their storage."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.uses: dict[int, _Use] = {}
        self._parameters = {_storage(p): (name, p) for name, p in parameters.items()}
        # A storage that is freed would give its address to another.
        self._alive: list[Tensor] = []

    def follow(self, output: Tensor, use: _Use) -> None:
        """Watch what becomes of `output`."""
        self.uses[_storage(output)] = use
        self._alive.append(output)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [a for a in args if isinstance(a, Tensor)]
        if not isinstance(out, Tensor):
            self._refuse(func, given)
            return out
        if func.overloadpacket in _COPIES:
            self._copy(given[0], out)
        elif func.overloadpacket not in _SHAPED and all(
            _storage(out) != _storage(a) for a in given
        ):
            self._record(func, args, given)
        return out

    def _copy(self, source: Tensor, out: Tensor) -> None:
        for known in (self.uses, self._parameters):
            if _storage(source) in known:
                known[_storage(out)] = known[_storage(source)]  # type: ignore[assignment]
                self._alive.append(out)

    def _record(self, func: Any, args: tuple, given: list[Tensor]) -> None:
        at = _PRODUCTS.get(func.overloadpacket)
        if at is not None and _storage(args[at]) in self.uses:
            use, other = self.uses[_storage(args[at])], args[at + 1]
            name, parameter = self._parameters.get(_storage(other), ("", other))
            if name and parameter.dim() == 2 and parameter.shape[1] == args[at].shape[-1]:
                use.matrices.add(name)
                return
        self._refuse(func, given)

    def _refuse(self, func: Any, given: list[Tensor]) -> None:
        for tensor in given:
            use = self.uses.get(_storage(tensor))
            if use is not None:
                use.others.append(str(func.overloadpacket).removeprefix("aten."))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _trace(model: PreTrainedModel, sites: list[MoESite], family: str) -> dict[str, _Use]:
    """Path of the experts -> the uses of the norm output that they get."""
    watch = _Watch(dict(model.named_parameters()))
    found: dict[str, _Use] = {}

    def seen(path: str, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        if _storage(hidden) in watch.uses:
            found[path] = watch.uses[_storage(hidden)]
        return torch.empty_like(hidden)

    def followed(path: str, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            watch.follow(output, _Use(path))

    for path, module in model.named_modules():
        if "norm" in type(module).__name__.lower():
            module.register_forward_hook(partial(followed, path))
    for site in sites:
        if site.kind == "seam":
            site.experts.forward = partial(seen, site.experts_path)
    ids = torch.zeros(1, TRACED, dtype=torch.long, device="meta")
    try:
        with torch.no_grad(), watch:
            model(input_ids=ids)
    except (NotImplementedError, RuntimeError, TypeError, ValueError, IndexError) as error:
        # What a forward may stumble over that has shapes and no values; not all of it has words.
        told = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(
            f"{family} cannot be traced without its weights "
            f"({told[:80]}), so the inputs of its experts cannot be scaled; "
            "take rtn or gptq."
        ) from None
    return found


def _is_zero_centred(norm: nn.Module, where: str) -> bool:
    """Whether a weight of zero means a factor of one; raises `UserError` for other norms."""
    names = {name for name, _ in norm.named_parameters()}
    if "weight" not in names or names - {"weight", "bias"}:
        raise UserError(f"{where}: {type(norm).__name__} has no weight to scale; take rtn or gptq.")
    module: Any = copy.deepcopy(norm).to_empty(device="cpu").float()
    size = module.weight.shape[-1]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, size, generator=generator)
    weight = torch.rand(size, generator=generator) + 0.5
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(weight if name == "weight" else torch.zeros(size))
        plain = module(x)
        for zero_centred in (False, True):
            module.weight.copy_(3 * (weight + 1) - 1 if zero_centred else 3 * weight)
            if torch.allclose(module(x), 3 * plain, rtol=1e-4, atol=1e-5):
                return zero_centred
    raise UserError(
        f"{where}: the output of {type(norm).__name__} is not in proportion to its weight; take "
        "rtn or gptq."
    )


def scalings_of(model: PreTrainedModel) -> dict[int, InputScaling]:
    """`input_scalings` of a loaded model."""
    return input_scalings(copy.deepcopy(model.config))
