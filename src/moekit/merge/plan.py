"""From a recipe and its models to one job for every tensor of the result, not computed yet."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moekit.core.errors import UserError
from moekit.core.seeds import generator
from moekit.merge.catalogue import merge_methods
from moekit.merge.job import REQUIRED, ByTensor, MergeMethod, Rows, TensorJob
from moekit.merge.methods import SHARES
from moekit.merge.parameters import Level, depth_of, resolve
from moekit.merge.recipe import MergeRecipe, Slice, Source
from moekit.merge.sources import MergeSources, common_shape, expert_banks, layer_of_name

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class MergedTensor:
    """A tensor of the result: how it is made, and the dtype it is written in.

    With `by_expert` its first axis are experts, which are merged one by one.
    """

    method: MergeMethod
    job: TensorJob
    dtype: torch.dtype
    by_expert: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.job.shape

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def working_bytes(self) -> int:
        """About what merging it whole takes: its models, the result and some work."""
        models = len(self.job.tensors) + 2
        itemsize = 4 if isinstance(self.method.run, ByTensor) else self.job.dtype.itemsize
        return self.nbytes + models * torch.Size(self.shape).numel() * itemsize

    def pieces(self, first: int = 0) -> Rows:
        """(row, rows from there) from row `first` on, in order."""
        if self.by_expert:
            for expert in range(first, self.shape[0]):
                job = self.job.of_expert(expert)
                rows = [block for _, block in self.method.run(job)]
                whole = torch.cat(rows) if job.shape else rows[0]
                yield expert, whole.to(self.dtype).unsqueeze(0)
            return
        for start, block in self.method.run(self.job):
            block = block.to(self.dtype)
            if block.ndim == 0:
                yield 0, block
            elif start + len(block) > first:
                skip = max(0, first - start)
                yield start + skip, block[skip:].contiguous()


@dataclass(frozen=True)
class _Place:
    """A tensor of the result and, for each source of its slice, the tensor it is made of."""

    name: str
    slice: Slice
    names: tuple[str, ...]
    depth: float


def plan_merge(recipe: MergeRecipe, sources: MergeSources, seed: int) -> dict[str, MergedTensor]:
    """Every tensor of the result by name, checked: methods, parameters, models, shapes.

    Raises `UserError` for whatever in the request cannot be done.
    """
    methods = merge_methods(recipe.dialect)
    _check_parameters(recipe, methods)
    dtype = _dtype(recipe.dtype, "dtype") or (torch.float32 if recipe.dialect == "paper" else None)
    out_dtype = _dtype(recipe.out_dtype, "out_dtype") or _dtype(recipe.dtype, "dtype")
    banks = expert_banks(sources[recipe.reference]) if recipe.scope == "expert" else set()
    made = {}
    for place in _places(recipe, sources):
        tensor = _merged(recipe, place, sources, methods, dtype, out_dtype, seed)
        made[place.name] = dataclasses.replace(tensor, by_expert=place.names[0] in banks)
    return made


def reads_text(recipe: MergeRecipe) -> bool:
    """Whether a method or a search of the recipe learns from text."""
    methods = merge_methods(recipe.dialect)
    used = (_known_method(name, methods) for name in _method_names(recipe))
    return recipe.search is not None or any(method.data for method in used)


def _method_names(recipe: MergeRecipe) -> list[str]:
    names = [recipe.method, *(part.method for part in recipe.slices)]
    names += [rule.method for rule in recipe.rules]
    return [name for name in names if name is not None]


def result_layers(recipe: MergeRecipe, sources: MergeSources) -> list[int]:
    """For every layer of the result, the layer of its first source it is made of."""
    found: list[int] = []
    for part in recipe.slices:
        first, last = _span(part.sources[0], sources)
        found += range(first, last)
    return found


def _places(recipe: MergeRecipe, sources: MergeSources) -> Iterator[_Place]:
    offset = 0
    for number, part in enumerate(recipe.slices):
        spans = [_span(source, sources) for source in part.sources]
        count = spans[0][1] - spans[0][0]
        if any(last - first != count for first, last in spans):
            told = [f"{s.model} {b - a}" for s, (a, b) in zip(part.sources, spans, strict=True)]
            raise UserError(
                f"slices[{number}]: the sources differ in their layers: {', '.join(told)}."
            )
        lead = sources[part.sources[0].model].tensors
        for name in lead:
            inside = layer_of_name(name)
            if inside is None:
                # Embeddings belong to the first slice, the norm and the head behind to the last.
                wanted = 0 if "embed" in name else len(recipe.slices) - 1
                if number == wanted:
                    yield _Place(name, part, (name,) * len(part.sources), 0.0)
                continue
            before, layer, after = inside
            place = layer - spans[0][0]
            if not 0 <= place < count:
                continue
            names = tuple(f"{before}{first + place}{after}" for first, _ in spans)
            yield _Place(f"{before}{offset + place}{after}", part, names, depth_of(place, count))
        offset += count


def _span(source: Source, sources: MergeSources) -> tuple[int, int]:
    layers = sources[source.model].num_layers
    first, last = source.layers or (0, layers)
    if last > layers:
        raise UserError(
            f"layer_range [{first}, {last}] goes beyond the {layers} layers of {source.model}."
        )
    return first, last


def _merged(
    recipe: MergeRecipe,
    place: _Place,
    sources: MergeSources,
    methods: Mapping[str, MergeMethod],
    dtype: torch.dtype | None,
    out_dtype: torch.dtype | None,
    seed: int,
) -> MergedTensor:
    part = place.slice
    rule = next((rule for rule in recipe.rules if rule.filter in place.name), None)
    name = rule.method if rule is not None else (part.method or recipe.method or "")
    method = _known_method(name, methods)
    common: list[Level] = [part.parameters, recipe.parameters]
    if rule is not None:
        common = [rule.parameters, *common]
    base = part.base or recipe.base
    used = [
        (source, tensor)
        for source, tensor in zip(part.sources, place.names, strict=True)
        if method.base == "none" or source.model != base
    ]
    method.check(len(used), base is not None)
    # A model may come twice: its places are told apart, without regard to the other models'.
    models = [source.model for source, _ in used]
    tensors = {
        f"{model}#{models[:number].count(model)}": _tensor(sources, model, used[number][1])
        for number, model in enumerate(models)
    }
    origins = tuple((source.model, tensor) for source, tensor in used)
    below = base_origin = None
    if method.base != "none" and base is not None:
        mine = [t for s, t in zip(part.sources, place.names, strict=True) if s.model == base]
        base_origin = (base, mine[0] if mine else place.names[0])
        below = _tensor(sources, *base_origin)
    shown = {model.partition("#")[0]: tensor for model, tensor in tensors.items()}
    common_shape(place.name, shown if below is None else {**shown, str(base): below})

    def value(key: str, default: Any, levels: Sequence[Level]) -> Any:
        found = resolve(key, levels, place.name, place.depth, default)
        if found is REQUIRED:
            raise UserError(f"{method.name} needs the parameter {key}; {place.name} has none.")
        return found

    per_model = {
        key: [value(key, default, [source.parameters, *common]) for source, _ in used]
        for key, default in method.per_model.items()
    }
    options = {key: value(key, default, common) for key, default in method.options.items()}
    own = (below if below is not None else next(iter(tensors.values()))).dtype
    job = TensorJob(
        place.name,
        below,
        list(tensors.values()),
        per_model,
        options,
        dtype or own,
        _generators(seed, place.name, list(tensors)),
        origins,
        base_origin,
    )
    return MergedTensor(method, job, out_dtype or own)


def _generators(seed: int, tensor: str, models: list[str]) -> Callable[[int], torch.Generator]:
    # By model and tensor, so that neither the order of tensors nor an interruption changes a draw.
    return lambda number: generator(seed, f"merge {models[number]} {tensor}")


def _tensor(sources: MergeSources, model: str, name: str) -> Any:
    tensors = sources[model].tensors
    if name not in tensors:
        raise UserError(f"{model} has no tensor {name}, which the other models have.")
    return tensors[name]


def _known_method(name: str, methods: Mapping[str, MergeMethod]) -> MergeMethod:
    if name in methods:
        return methods[name]
    near = difflib.get_close_matches(name, methods, 1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(methods))}"
    raise UserError(f"no merge_method {name!r}: {hint}")


def _check_parameters(recipe: MergeRecipe, methods: Mapping[str, MergeMethod]) -> None:
    """Every parameter is one of a method that the recipe uses, and every share is one."""
    used = [_known_method(name, methods) for name in _method_names(recipe)]
    known = {key for method in used for key in (*method.per_model, *method.options)}
    levels = [recipe.parameters, *(rule.parameters for rule in recipe.rules)]
    for part in recipe.slices:
        levels += [part.parameters, *(source.parameters for source in part.sources)]
    for key, value in (item for level in levels for item in level.items()):
        if key not in known:
            near = difflib.get_close_matches(key, sorted(known), 1)
            hint = f"did you mean {near[0]}?" if near else f"they take {', '.join(sorted(known))}"
            told = ", ".join(dict.fromkeys(method.name for method in used))
            raise UserError(f"{told} has no parameter {key!r}: {hint}")
        if key in SHARES and isinstance(value, int | float) and not 0 <= value <= 1:
            raise UserError(f"{key} is {value}; it is a share, from 0 to 1.")


def _dtype(name: str | None, key: str) -> torch.dtype | None:
    if name is None:
        return None
    if name not in DTYPES:
        raise UserError(f"{key} {name!r} is unknown; there are {', '.join(DTYPES)}.")
    return DTYPES[name]
