"""Merge recipes in mergekit's YAML, with what it cannot say: steps, and a method for each part.

mergekit's keys mean what they mean there: exactly one of `models` or `slices`; `merge_method`,
`base_model`, `parameters`, `dtype`, `out_dtype`, `tokenizer_source`. Beyond them:

- `dialect: mergekit` (the default) or `paper`, where a method's paper and mergekit disagree;
- a slice may have a `merge_method` and `parameters` of its own;
- `rules`: a list of {filter, merge_method, parameters}: the first whose filter is part of the name
  of a tensor decides how that tensor is merged;
- `align: experts`: the experts and neurons of MoE models come into the order of the base's, or the
  first model's, before they are merged (`align_experts`);
- `scope: expert`: what a method takes over a tensor is taken over each expert of a bank instead;
- `data`: text for methods that need it, files or {files, max_tokens, seq_len}; a model may have
  `data` of its own;
- `search`: {over, groups, budget, ...}: parameters of the models by layer, searched on `data`;
- `steps`: a list of recipes with a `name` each; later ones may use the names as models.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from moekit.core.errors import UserError

DIALECTS = ("mergekit", "paper")
ALIGNMENTS = ("experts",)
SCOPES = ("tensor", "expert")
KEYS = {
    "align",
    "base_model",
    "chat_template",
    "data",
    "dialect",
    "dtype",
    "merge_method",
    "models",
    "name",
    "out_dtype",
    "parameters",
    "rules",
    "scope",
    "search",
    "slices",
    "tokenizer",
    "tokenizer_source",
}
UNSUPPORTED = {"modules": "models of several towers"}


@dataclass(frozen=True)
class Text:
    """The text that methods learn from: files as `read_texts` takes them, and how much of it."""

    files: tuple[str, ...] = ()
    max_tokens: int = 65_536
    seq_len: int = 512


@dataclass(frozen=True)
class Search:
    """A search of the models' parameters `over`, one value for each group of layers and model.

    `budget` merges are tried, by CMA-ES from the recipe's values with steps of `sigma`; values stay
    within `low` and `high`.
    """

    over: tuple[str, ...] = ("weight",)
    groups: int = 4
    budget: int = 100
    sigma: float = 0.2
    low: float = 0.0
    high: float = 1.5


@dataclass(frozen=True)
class Source:
    """One model's part of a slice: layers [first, last) of it, None for all, and its parameters.

    `data` are files of text for this model alone.
    """

    model: str
    layers: tuple[int, int] | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    data: tuple[str, ...] = ()


@dataclass(frozen=True)
class Slice:
    """Layers of the result made from layers of the sources, by the slice's method if it has one."""

    sources: tuple[Source, ...]
    method: str | None = None
    base: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rule:
    """How tensors are merged whose name contains `filter`."""

    filter: str
    method: str
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MergeRecipe:
    """One merge: what `load_merge` reads; `steps` come before it, by name."""

    method: str | None
    slices: tuple[Slice, ...]
    base: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()
    dialect: str = "mergekit"
    align: str | None = None
    scope: str = "tensor"
    text: Text = field(default_factory=Text)
    search: Search | None = None
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer: Any = None
    chat_template: str | None = None
    name: str | None = None

    @property
    def reference(self) -> str:
        """The base, or else the first model: what others are aligned to, and the config's donor."""
        return self.base or self.slices[0].sources[0].model

    def files_of(self, model: str) -> tuple[str, ...]:
        """The files of text of one model: its own, else those of the recipe."""
        for part in self.slices:
            for source in part.sources:
                if source.model == model and source.data:
                    return source.data
        return self.text.files

    @property
    def models(self) -> list[str]:
        """Every model that is named, once, in order of appearance, the base included."""
        named = [source.model for part in self.slices for source in part.sources]
        named += [part.base for part in self.slices if part.base is not None]
        named += [] if self.base is None else [self.base]
        return list(dict.fromkeys(named))


def load_merge(path: Path) -> list[MergeRecipe]:
    """The merges of a recipe file in the order they are done; the last one is the result.

    Raises `UserError` naming the key for anything unknown, missing or of the wrong type.
    """
    import yaml

    try:
        raw = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"recipe {path} is not valid YAML: {error}") from None
    if not isinstance(raw, Mapping):
        raise UserError(f"recipe {path}: expected a mapping with merge_method, models, ...")
    if "steps" not in raw:
        return [merge_from_dict(raw, str(path))]
    steps = raw["steps"]
    if not isinstance(steps, list) or not steps or set(raw) != {"steps"}:
        raise UserError(f"recipe {path}: steps is a list of recipes, and stands alone.")
    recipes = [merge_from_dict(one, f"{path}: steps[{n}]") for n, one in enumerate(steps)]
    for number, recipe in enumerate(recipes[:-1]):
        if recipe.name is None:
            raise UserError(f"recipe {path}: steps[{number}] needs a name for the steps after it.")
    names = [recipe.name for recipe in recipes[:-1]]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"recipe {path}: two steps are called {twice!r}.")
    return recipes


def with_text(recipe: MergeRecipe, given: Mapping[str, Any]) -> MergeRecipe:
    """The recipe with other fields of its `Text`; those that are None stay."""
    changes = {key: value for key, value in given.items() if value is not None}
    return replace(recipe, text=replace(recipe.text, **changes))


def merge_from_dict(raw: Any, where: str = "the recipe") -> MergeRecipe:
    """A checked recipe from plain data, without `steps`."""
    if not isinstance(raw, Mapping):
        raise UserError(f"{where}: expected a mapping, got {raw!r}.")
    for key, what in UNSUPPORTED.items():
        if key in raw:
            raise UserError(f"{where}: {key} ({what}) are not merged by moekit.")
    _known(raw, KEYS, where)
    if ("models" in raw) == ("slices" in raw):
        raise UserError(f"{where}: give exactly one of models and slices.")
    dialect = raw.get("dialect", "mergekit")
    if dialect not in DIALECTS:
        raise UserError(f"{where}: dialect {dialect!r}; there are {' and '.join(DIALECTS)}.")
    align = raw.get("align")
    if align is not None and align not in ALIGNMENTS:
        raise UserError(f"{where}: align {align!r}; there is {', '.join(ALIGNMENTS)}.")
    scope = raw.get("scope", "tensor")
    if scope not in SCOPES:
        raise UserError(f"{where}: scope {scope!r}; there are {' and '.join(SCOPES)}.")
    if "models" in raw:
        sources = tuple(
            _source(one, f"{where}: models[{n}]") for n, one in _items(raw, "models", where)
        )
        slices: tuple[Slice, ...] = (Slice(sources),)
    else:
        slices = tuple(
            _slice(one, f"{where}: slices[{n}]") for n, one in _items(raw, "slices", where)
        )
    rules = tuple(
        _rule(one, f"{where}: rules[{n}]") for n, one in enumerate(raw.get("rules") or [])
    )
    method = raw.get("merge_method")
    if method is None and not all(part.method for part in slices):
        raise UserError(f"{where}: merge_method is missing.")
    if "tokenizer" in raw and "tokenizer_source" in raw:
        raise UserError(f"{where}: give tokenizer or tokenizer_source, not both.")
    template = raw.get("chat_template")
    if template is not None and "{" not in str(template):
        raise UserError(
            f"{where}: chat_template {template!r} is a name; give the text of a Jinja template, or "
            "leave it out for that of the tokenizer."
        )
    base = raw.get("base_model")
    return MergeRecipe(
        method=None if method is None else str(method),
        slices=slices,
        base=None if base is None else str(_model_name(base)),
        parameters=_parameters(raw, where),
        rules=rules,
        dialect=dialect,
        align=align,
        scope=scope,
        text=_text(raw.get("data"), where),
        search=_search(raw.get("search"), where),
        dtype=raw.get("dtype"),
        out_dtype=raw.get("out_dtype"),
        tokenizer=raw.get("tokenizer", raw.get("tokenizer_source")),
        chat_template=template,
        name=raw.get("name"),
    )


def _slice(raw: Any, where: str) -> Slice:
    _known(raw, {"sources", "base_model", "parameters", "merge_method"}, where)
    sources = tuple(
        _source(one, f"{where}: sources[{n}]", layers=True)
        for n, one in _items(raw, "sources", where)
    )
    counts = {
        last - first for first, last in (source.layers for source in sources if source.layers)
    }
    if len(counts) > 1:
        raise UserError(f"{where}: the sources have {sorted(counts)} layers; one number is needed.")
    base = raw.get("base_model")
    return Slice(sources, raw.get("merge_method"), base, _parameters(raw, where))


def _source(raw: Any, where: str, layers: bool = False) -> Source:
    _known(raw, {"model", "parameters", "data", *(["layer_range"] if layers else [])}, where)
    if "model" not in raw:
        raise UserError(f"{where}: model is missing.")
    span = raw.get("layer_range")
    if layers and span is not None:
        good = isinstance(span, list) and len(span) == 2 and all(type(n) is int for n in span)
        if not good or not 0 <= span[0] < span[1]:
            raise UserError(f"{where}: layer_range {span!r} is not [first, behind the last].")
    return Source(
        str(_model_name(raw["model"])),
        None if span is None else tuple(span),
        _parameters(raw, where),
        _files(raw.get("data"), where),
    )


def _text(raw: Any, where: str) -> Text:
    if not isinstance(raw, Mapping):
        return Text(_files(raw, where))
    return Text(
        **_numbers(Text(), raw, f"{where}: data") | {"files": _files(raw.get("files"), where)}
    )


def _search(raw: Any, where: str) -> Search | None:
    if raw is None:
        return None
    _known(raw, {one.name for one in fields(Search)}, f"{where}: search")
    over = raw.get("over", Search.over)
    over = (over,) if isinstance(over, str) else tuple(over)
    return Search(**_numbers(Search(), raw, f"{where}: search") | {"over": over})


def _numbers(defaults: Any, raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The numbers that are given among the fields of `defaults`, checked."""
    kinds = {one.name: type(getattr(defaults, one.name)) for one in fields(defaults)}
    _known(raw, set(kinds), where)
    found = {}
    for key, value in raw.items():
        if kinds[key] is tuple:
            continue
        good = type(value) is int or (kinds[key] is float and type(value) is float)
        if not good or (value <= 0 and key != "low"):
            raise UserError(f"{where}: {key} is {value!r}, not a positive {kinds[key].__name__}.")
        found[key] = kinds[key](value)
    return found


def _files(raw: Any, where: str) -> tuple[str, ...]:
    if raw is None:
        return ()
    found = [raw] if isinstance(raw, str) else raw
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise UserError(f"{where}: data is {raw!r}: give a file, a directory, or a list of them.")
    return tuple(found)


def _rule(raw: Any, where: str) -> Rule:
    _known(raw, {"filter", "merge_method", "parameters"}, where)
    if "filter" not in raw or "merge_method" not in raw:
        raise UserError(f"{where}: a rule has a filter and a merge_method.")
    return Rule(str(raw["filter"]), str(raw["merge_method"]), _parameters(raw, where))


def _model_name(raw: Any) -> Any:
    if isinstance(raw, Mapping) and isinstance(raw.get("model"), Mapping):
        raw = raw["model"].get("path")
    if not isinstance(raw, str) or not raw:
        raise UserError(f"{raw!r} is no model: give a directory, a hub id or a step's name.")
    if "+" in raw:
        raise UserError(
            f"{raw}: adapters are not merged on the fly; merge {raw.split('+')[1]} first."
        )
    return raw


def _parameters(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    found = raw.get("parameters") or {}
    if not isinstance(found, Mapping):
        raise UserError(f"{where}: parameters is {found!r}, not a mapping.")
    return {str(key): value for key, value in found.items()}


def _items(raw: Mapping[str, Any], key: str, where: str) -> list[tuple[int, Any]]:
    found = raw.get(key)
    if not isinstance(found, list) or not found:
        raise UserError(f"{where}: {key} is {found!r}, not a list of at least one.")
    return list(enumerate(found))


def _known(raw: Any, keys: set[str], where: str) -> None:
    if not isinstance(raw, Mapping):
        raise UserError(f"{where}: expected a mapping, got {raw!r}.")
    for key in raw:
        if key not in keys:
            near = difflib.get_close_matches(str(key), sorted(keys), 1)
            hint = f"Did you mean '{near[0]}'?" if near else f"There are {', '.join(sorted(keys))}."
            raise UserError(f"{where}: unknown key '{key}'. {hint}")
