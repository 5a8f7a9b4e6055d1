"""Two dense models that need not share a base, merged unit by unit (PLeaS 2407.02447).

Units are matched by what they say on the same text, the second model is brought into the first's
order, and every matrix is fitted to what both compute. Shapes: D width, F inner width, T tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moekit.core.errors import UserError
from moekit.merge.decoder_groups import DecoderGroups, decoder_groups, unit_similarity
from moekit.merge.job import MergeMethod, Rows, TensorJob
from moekit.merge.preparation import Preparation
from moekit.ops.align import match
from moekit.ops.widened import Pairing, merged_matrix

# Moments that are held at a time; more layers take more passes over the text.
LIMIT_BYTES = 2 << 30


def pleas(jobs: Mapping[str, TensorJob], room: Preparation) -> dict[str, TensorJob]:
    """The jobs with the merged tensors in the place of the models'."""
    first = next(iter(jobs.values()))
    names = [model for model, _ in first.origins]
    if any(job.origins != tuple((model, job.name) for model in names) for job in jobs.values()):
        raise UserError("pleas merges whole models: give models, not slices of them.")
    ratio = float(first.options["ratio"])
    if not 0 <= ratio <= 1:
        raise UserError(f"ratio is {ratio}; it is a share of neurons, from 0 to 1.")

    def make() -> dict[str, Tensor]:
        networks = [room.model(name) for name in names]
        text = room.sequences(names[0])
        tensors = [
            {name: job.whole(job.tensors[n]).float() for name, job in jobs.items()}
            for n in range(2)
        ]
        groups = decoder_groups(networks[0], list(jobs))
        similar = matched_units(groups, networks, text, room)
        orders = {name: match(values) for name, values in similar.items()}
        tensors[1] = groups.permuted(tensors[1], orders)
        networks[1].load_state_dict(tensors[1], strict=False)
        pairings = {
            name: Pairing.by_similarity(similar[name][torch.arange(len(order)), order], ratio)
            if name.startswith("inner")
            else Pairing.whole(len(order))
            for name, order in orders.items()
        }
        return fitted(
            groups, pairings, networks, tensors, text, float(first.options["ridge"]), room
        )

    made = room.kept("pleas", make)
    config: Any = room.sources[names[0]].config.get_text_config(decoder=True)
    room.config["intermediate_size"] = round(config.intermediate_size * ratio) + (
        config.intermediate_size
    )
    return {name: dataclasses.replace(job, tensors=[made[name]]) for name, job in jobs.items()}


def matched_units(
    groups: DecoderGroups,
    networks: Sequence[PreTrainedModel],
    text: Sequence[Tensor],
    room: Preparation,
) -> dict[str, Tensor]:
    """For every group how alike the units of both networks are on the text, [units, units]."""
    found = {}
    for part in _parts({g: groups.watched[g] for g in groups.units}, networks[0]):
        sums = {name: _Correlation() for name in part}
        for number, ids in enumerate(text):
            seen = _inputs(networks, sorted({m for modules in part.values() for m in modules}), ids)
            for name, modules in part.items():
                for module in modules:
                    sums[name].add(*seen[module])
            room.told("units of both models", number + 1, len(text))
        for name, held in sums.items():
            found[name] = unit_similarity(held.value(), groups.units[name])
    return found


def fitted(
    groups: DecoderGroups,
    pairings: Mapping[str, Pairing],
    networks: Sequence[PreTrainedModel],
    tensors: Sequence[Mapping[str, Tensor]],
    text: Sequence[Tensor],
    ridge: float,
    room: Preparation,
) -> dict[str, Tensor]:
    """The merged tensors of two aligned networks."""
    linear = {
        name: [name.removesuffix(".weight")]
        for name in tensors[0]
        if name.endswith(".weight") and len(groups.of(name)) == 2
    }
    made = {
        name: _joined(groups.of(name), pairings, tensor, tensors[1][name])
        for name, tensor in tensors[0].items()
        if name not in linear
    }
    for part in _parts(linear, networks[0]):
        moments: dict[str, Tensor] = {}
        for number, ids in enumerate(text):
            seen = _inputs(networks, [modules[0] for modules in part.values()], ids)
            for module, pair in seen.items():
                both = torch.cat(pair, dim=1)
                if module not in moments:
                    moments[module] = torch.zeros(both.shape[1], both.shape[1])
                moments[module].addmm_(both.T, both)
            room.told("outputs of both models", number + 1, len(text))
        for name, (module,) in part.items():
            of = groups.of(name)
            rows, columns = (_entries(pairings[of[a]], tensors[0][name].shape[a]) for a in (0, 1))
            pair = (tensors[0][name], tensors[1][name])
            made[name] = merged_matrix(*pair, rows, columns, moments.get(module), ridge)
    return made


def _joined(
    axes: Mapping[int, str], pairings: Mapping[str, Pairing], first: Tensor, second: Tensor
) -> Tensor:
    """A vector or table of both: merged units are averaged."""
    if set(axes) == {0}:
        rows = _entries(pairings[axes[0]], len(first))
        return rows.read(torch.cat([first, second]))
    return (first + second) / 2


def _entries(pairing: Pairing, size: int) -> Pairing:
    """The pairing of units of several entries each, entry by entry."""
    block = size // pairing.units
    if block == 1:
        return pairing
    return Pairing(*(_spread(units, block) for units in (pairing.merged, pairing.separate)))


def _spread(units: Tensor, block: int) -> Tensor:
    return (units.unsqueeze(1) * block + torch.arange(block)).flatten()


class _Correlation:
    """Correlations [n, n] of the entries of two networks over tokens, added up."""

    def __init__(self) -> None:
        self._sums: list[Tensor] = []
        self._tokens = 0

    def add(self, first: Tensor, second: Tensor) -> None:
        """Add inputs [T, n] of both."""
        x, y = first.double(), second.double()
        new = [x.T @ y, x.sum(0), y.sum(0), x.square().sum(0), y.square().sum(0)]
        self._sums = (
            new if not self._sums else [a + b for a, b in zip(self._sums, new, strict=True)]
        )
        self._tokens += len(x)

    def value(self) -> Tensor:
        """0 where an entry never varies."""
        products, x, y, xx, yy = (one / self._tokens for one in self._sums)
        deviations = [(s - m.square()).clamp(min=0).sqrt() for s, m in ((xx, x), (yy, y))]
        scale = torch.outer(*deviations)
        found = (products - torch.outer(x, y)) / scale.clamp(min=1e-30)
        return torch.where(scale > 1e-12 * scale.max(), found, torch.zeros_like(found))


def _inputs(
    networks: Sequence[PreTrainedModel], modules: Sequence[str], ids: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """What some modules of both networks read on one sequence, [T, n] each."""
    found: list[dict[str, Tensor]] = []
    for network in networks:
        with _watching(network, modules) as seen, torch.no_grad():
            network(input_ids=ids, use_cache=False)
        found.append(seen)
    return {module: (found[0][module], found[1][module]) for module in found[0]}


@contextmanager
def _watching(network: nn.Module, modules: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def see(module: nn.Module, args: tuple[Any, ...]) -> None:
            seen[name] = args[0].detach().flatten(0, -2).float()

        return see

    handles = [
        network.get_submodule(name).register_forward_pre_hook(hook(name)) for name in modules
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _parts(wanted: Mapping[str, list[str]], network: nn.Module) -> Iterator[dict[str, list[str]]]:
    """`wanted` (name -> modules) in parts whose moments fit into memory together."""
    part: dict[str, list[str]] = {}
    used = 0
    for name, modules in wanted.items():
        weight: Any = network.get_submodule(modules[0]).weight
        size = 16 * int(weight.shape[-1]) ** 2
        if part and used + size > LIMIT_BYTES:
            yield part
            part, used = {}, 0
        part[name] = modules
        used += size
    if part:
        yield part


def merged_rows(job: TensorJob) -> Rows:
    """The tensor that `pleas` has made."""
    for start, stop in job.spans():
        yield start, job.rows(job.tensors[0], start, stop)


METHOD = MergeMethod(
    "pleas",
    merged_rows,
    "none",
    {},
    {"ratio": 0.0, "ridge": 1e-2},
    (2, 2),
    prepare=pleas,
    data=True,
)
