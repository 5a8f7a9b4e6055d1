"""What stands in each layer of a model: the `moe` section of a config, read and checked.

moe:
  router: softmax-raw                  # or {name: deepseek-v3, groups: 4, keep_groups: 2}
  top_k: 2
  experts: {type: swiglu, count: 8, expert_width: 64}     # or a list of banks
  shared: {type: swiglu, expert_width: 64, join: sum}     # left out: none
  rounds: 1                            # a chain of experts: {count: 2, norm: false, tied: false}
  layers: {first: 1, every: 2}         # or a list of layers; left out: all of them
  share_pool: 1                        # so many MoE layers in a row use one pool
  overrides:                           # some layers' own settings, a pyramid for one
    - {layers: [6, 7], experts: {type: swiglu, count: 16, expert_width: 64}}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moekit.core.errors import UserError

from .moe import JOINS
from .names import one_of

_PARTS = ("router", "top_k", "experts", "shared", "rounds")
_KEYS = (*_PARTS, "layers", "share_pool", "overrides")


@dataclass(frozen=True)
class BankRecipe:
    """A bank: `count` experts of a registered `type` with its `options`."""

    type: str
    count: int
    options: dict[str, Any]


@dataclass(frozen=True)
class Rounds:
    """`count` rounds through the experts, each with `top_k` of them; see `chain`."""

    count: int = 1
    norm: bool = False
    tied: bool = False


@dataclass(frozen=True)
class LayerRecipe:
    """One MoE layer. `shared` is a bank of one expert, or None, joined as `join` says.

    `pool_of` is the layer whose pool this one uses; its own number as a rule.
    """

    router: str
    router_options: dict[str, Any]
    top_k: int
    banks: tuple[BankRecipe, ...]
    shared: BankRecipe | None = None
    join: str = "sum"
    pool_of: int = 0
    rounds: Rounds = Rounds()

    @property
    def num_experts(self) -> int:
        return sum(bank.count for bank in self.banks)


def read_layers(moe: Mapping[str, Any] | None, num_layers: int) -> list[LayerRecipe | None]:
    """The recipe of each of `num_layers` layers; None for a dense one.

    Raises UserError for anything unknown, missing or out of range. Names of routers and experts and
    their options are checked when the parts are built.
    """
    if moe is None:
        return [None] * num_layers
    _check_keys(moe, _KEYS, "moe")
    places = _places(moe.get("layers"), num_layers)
    settings: dict[int, dict[str, Any]] = {
        layer: {part: moe[part] for part in _PARTS if part in moe} for layer in places
    }
    for number, change in enumerate(moe.get("overrides") or ()):
        where = f"moe.overrides[{number}]"
        _check_keys(change, ("layers", *_PARTS), where)
        for layer in _places(change.get("layers"), num_layers, where):
            if layer not in settings:
                raise UserError(f"{where}.layers names layer {layer}, which is not a MoE layer")
            settings[layer] |= {part: change[part] for part in _PARTS if part in change}
    together = moe.get("share_pool", 1)
    if not isinstance(together, int) or together < 1:
        raise UserError(
            f"moe.share_pool is {together!r}; it must be a number of layers, 1 at least"
        )
    layers: list[LayerRecipe | None] = [None] * num_layers
    for place, layer in enumerate(places):
        owner = places[place - place % together]
        layers[layer] = _layer(settings[layer], layer, owner)
        if layers[layer].banks != layers[owner].banks:  # type: ignore[union-attr]
            raise UserError(f"moe.share_pool: layers {owner} and {layer} differ in their experts")
    return layers


def _layer(values: Mapping[str, Any], layer: int, owner: int) -> LayerRecipe:
    for part in ("router", "top_k", "experts"):
        if part not in values:
            raise UserError(f"moe.{part} is missing")
    router = values["router"]
    named = {"name": router} if isinstance(router, str) else router
    if not isinstance(named, Mapping) or "name" not in named:
        raise UserError("moe.router has no name; write it as a name or as {name: ..., options}")
    named = dict(named)
    name = named.pop("name")
    top_k = values["top_k"]
    if not isinstance(top_k, int) or isinstance(top_k, bool):
        raise UserError(f"moe.top_k is {top_k!r}; expected a whole number")
    experts = values["experts"]
    banks = experts if isinstance(experts, list | tuple) else [experts]
    shared, join = values.get("shared"), "sum"
    if shared is not None:
        shared = {"type": "swiglu", "count": 1, **_mapping(shared, "moe.shared")}
        join = shared.pop("join", "sum")
        one_of("moe.shared.join", join, JOINS)
    return LayerRecipe(
        name,
        named,
        top_k,
        tuple(_bank(bank, "moe.experts") for bank in banks),
        _bank(shared, "moe.shared") if shared is not None else None,
        join,
        owner,
        _rounds(values.get("rounds", 1)),
    )


def _rounds(value: Any) -> Rounds:
    options = dict(value) if isinstance(value, Mapping) else {"count": value}
    _check_keys(options, ("count", "norm", "tied"), "moe.rounds")
    count = options.get("count", 1)
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise UserError(f"moe.rounds is {count!r}; it must be a whole number, 1 at least")
    return Rounds(**options)


def _bank(values: Any, where: str) -> BankRecipe:
    options = dict(_mapping(values, where))
    for key in ("type", "count"):
        if key not in options:
            raise UserError(f"{where} has no {key}; write it as {{type: swiglu, count: 8, ...}}")
    count = options.pop("count")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise UserError(f"{where}.count is {count!r}; it must be a whole number, 1 at least")
    return BankRecipe(options.pop("type"), count, options)


def _places(layers: Any, num_layers: int, where: str = "moe") -> list[int]:
    """The layers that `layers` names: a list, first and every, or None for all."""
    if layers is None:
        return list(range(num_layers))
    if isinstance(layers, Mapping):
        _check_keys(layers, ("first", "every"), f"{where}.layers")
        first, every = layers.get("first", 0), layers.get("every", 1)
        if not isinstance(every, int) or every < 1:
            raise UserError(f"{where}.layers.every is {every!r}; it must be a number, 1 at least")
        return [layer for layer in range(num_layers) if layer >= first][::every]
    if not isinstance(layers, list | tuple):
        raise UserError(f"{where}.layers is {layers!r}; expected a list, or first and every")
    wrong = [layer for layer in layers if layer not in range(num_layers)]
    if wrong:
        raise UserError(
            f"{where}.layers names {wrong}, but the model has layers 0 to {num_layers - 1}"
        )
    return sorted(set(layers))


def _check_keys(values: Any, known: tuple[str, ...], where: str) -> None:
    for key in _mapping(values, where):
        one_of(f"in {where} the field", key, known)


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UserError(f"{where} is {value!r}; expected fields with values")
    return value
