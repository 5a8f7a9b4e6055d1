"""`ExpertStats`: additive sums by layer and expert, which the methods share.

The statistics and their shapes are in `stats_table`. Everything is a sum, a maximum or a sample
over tokens, so the statistics of batches, processes and files combine by `merge`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moekit.core.errors import UserError
from moekit.core.stats_table import STATISTICS, Moment

if TYPE_CHECKING:
    from moekit.core.spec import MoESpec


@dataclass(frozen=True)
class StatsLayer:
    """One MoE layer of the statistics; `index` is the decoder layer, `name` the module path."""

    index: int
    name: str
    num_experts: int
    num_choices: int
    top_k: int


@dataclass(frozen=True)
class Lazy:
    """A statistic that is read, or added up, when it is asked for; `load_row(i)` reads one entry of
    its first axis, where that costs less."""

    shape: tuple[int, ...]
    load: Callable[[], Tensor]
    load_row: Callable[[int], Tensor] | None = None


@dataclass
class ExpertStats:
    """Sums over the tokens of a calibration text, by layer, expert and domain.

    `settings` are the choices two parts must share to be added: the moments' exponents, the share
    below which a logit is not kept, which tokens the input moments cover. `held` maps (position of
    the MoE layer, name of the statistic) to its values.
    """

    model_type: str
    layers: list[StatsLayer]
    domains: list[str]
    settings: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    held: dict[tuple[int, str], Tensor | Lazy] = field(default_factory=dict, repr=False)

    # -- reading --

    def has(self, position: int, name: str) -> bool:
        """Whether the layer at `position` has the statistic `name`."""
        return (position, name) in self.held

    def get(self, position: int, name: str) -> Tensor:
        """The statistic `name` of the layer at `position`, shaped as `STATISTICS[name].axes`.

        Raises UserError where it was not collected.
        """
        self._check_position(position)
        if name not in STATISTICS:
            raise UserError(f"no statistic is called {name!r}; there are {', '.join(STATISTICS)}.")
        value = self.held.get((position, name))
        if value is None:
            raise UserError(
                f"the stats have no {name!r} ({STATISTICS[name].meaning}) for "
                f"{self.layers[position].name}; profile again with the set that holds it."
            )
        return value.load() if isinstance(value, Lazy) else value

    def of_expert(self, position: int, name: str, expert: int) -> Tensor:
        """The entry of one expert of a statistic whose first axis counts experts.

        Of statistics on disk nothing else is read. Raises UserError as `get` does.
        """
        if not STATISTICS[name].axes.startswith("E"):
            raise UserError(f"{name!r} is not kept by expert.")
        value = self.held.get((position, name))
        if isinstance(value, Lazy) and value.load_row is not None:
            return value.load_row(expert)
        return self.get(position, name)[expert]

    def by_domain(self, position: int, name: str, domain: str | None = None) -> Tensor:
        """A statistic with a domain axis, without that axis: of one domain, or of all together."""
        value = self.get(position, name)
        if not STATISTICS[name].axes.startswith("G"):
            raise UserError(f"{name!r} is not split by domain.")
        if domain is None:
            return value.sum(0)
        if domain not in self.domains:
            raise UserError(f"no domain {domain!r}; the stats have {', '.join(self.domains)}.")
        return value[self.domains.index(domain)]

    def counts(self, position: int, domain: str | None = None) -> Tensor:
        """Tokens that chose each choice [C]."""
        return self.by_domain(position, "count", domain)

    def num_tokens(self, position: int, domain: str | None = None) -> int:
        """Tokens that passed the layer, without padding."""
        return int(self.by_domain(position, "tokens", domain))

    @property
    def moments(self) -> list[Moment]:
        """The exponents of the saliency sums that were collected, beside the counts."""
        return [Moment(*m) for m in self.settings.get("moments", [])]

    def saliency_sum(
        self,
        position: int,
        gate: int = 0,
        norm: int = 0,
        contribution: int = 0,
        domain: str | None = None,
    ) -> Tensor:
        """Sum over routed tokens of gate^gate * norm^norm * contribution^contribution, [C].

        `norm` is that of the expert's output before the gate weight; the contribution of a token
        is that of EASY-EP. Raises UserError for exponents that were not collected.
        """
        wanted = Moment(gate, norm, contribution)
        if wanted == Moment():
            return self.counts(position, domain).double()
        if wanted not in self.moments:
            kept = ", ".join(str(tuple(m)) for m in [Moment(), *self.moments])
            raise UserError(
                f"the stats have no sum with exponents {tuple(wanted)} of gate, norm and "
                f"contribution; they have {kept}."
            )
        values = self.by_domain(position, "moments", domain)[:, self.moments.index(wanted)]
        if contribution and bool(values.isnan().any()):
            raise UserError(
                f"{self.layers[position].name}: token contributions are not known for "
                f"{self.model_type!r}, since no norm leads from the residual stream to the experts."
            )
        return values

    def _check_position(self, position: int) -> None:
        if not 0 <= position < len(self.layers):
            raise UserError(
                f"the stats have MoE layers 0 to {len(self.layers) - 1}, not {position}."
            )

    # -- checking --

    def validate(self, spec: MoESpec) -> None:
        """Raise UserError unless these are statistics of a model with this spec."""
        if self.model_type != spec.model_type:
            raise UserError(
                f"the stats are those of a {self.model_type!r} model, not of {spec.model_type!r}."
            )
        if len(self.layers) != len(spec.per_layer):
            raise UserError(
                f"the stats have {len(self.layers)} MoE layers, the model {len(spec.per_layer)}."
            )
        for mine, theirs in zip(self.layers, spec.per_layer, strict=True):
            found = (mine.index, mine.num_experts, mine.top_k)
            expected = (theirs.layer_index, theirs.num_experts, theirs.top_k)
            if found != expected:
                raise UserError(
                    f"the stats say layer {found[0]}, {found[1]} experts, top {found[2]} where "
                    f"the model has layer {expected[0]}, {expected[1]} experts, top {expected[2]}."
                )

    def _check_addable(self, other: ExpertStats) -> None:
        if (self.model_type, self.layers) != (other.model_type, other.layers):
            raise UserError(
                f"stats of different models cannot be merged: {self._title()} and {other._title()}."
            )
        for key in sorted(self.settings.keys() | other.settings.keys()):
            if self.settings.get(key) != other.settings.get(key):
                raise UserError(
                    f"stats with different settings cannot be merged: {key} is "
                    f"{self.settings.get(key)} and {other.settings.get(key)}."
                )
        only = sorted(self.held.keys() ^ other.held.keys())
        if only:
            raise UserError(
                f"stats of different sets cannot be merged: {only[0][1]!r} of "
                f"{self.layers[only[0][0]].name} is in one only."
            )

    def _title(self) -> str:
        experts = sorted({layer.num_experts for layer in self.layers})
        return f"{self.model_type} with {len(self.layers)} MoE layers of {experts} experts"

    # -- combining --

    def merge(self, other: ExpertStats) -> ExpertStats:
        """The statistics of both texts together; domains of the same name become one.

        Raises UserError for another model, other settings, or another set of statistics.
        """
        self._check_addable(other)
        domains = sorted({*self.domains, *other.domains})
        merged = ExpertStats(
            self.model_type, self.layers, domains, dict(self.settings), dict(self.metadata)
        )
        for key, mine in self.held.items():
            merged.held[key] = _combined(
                key[1], (mine, other.held[key]), (self.domains, other.domains), domains
            )
        return merged

    def join(self, other: ExpertStats) -> ExpertStats:
        """More statistics of the same text and model side by side with these.

        Raises UserError where both have one statistic, or the texts are not the same.
        """
        same = self.model_type == other.model_type and self.layers == other.layers
        if not same or self.domains != other.domains or self.held.keys() & other.held.keys():
            raise UserError("only different statistics of one text and model can be joined.")
        return ExpertStats(
            self.model_type,
            self.layers,
            self.domains,
            {**self.settings, **other.settings},
            {**self.metadata, **other.metadata},
            {**self.held, **other.held},
        )

    # -- files --

    def digest(self) -> str:
        """A hash that tells these statistics from others, by what is cheap to read of them."""
        parts = [self.model_type, self.domains, self.settings, self.metadata]
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode())
        for key in sorted(self.held):
            value = self.held[key]
            digest.update(f"{key}{tuple(value.shape)}".encode())
            if not STATISTICS[key[1]].heavy:
                tensor = value.load() if isinstance(value, Lazy) else value
                digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def save(self, out: str | Path) -> None:
        """Write the directory `out`: `stats.json` and safetensors files, complete or not at all.

        Raises UserError when `out` exists or cannot be written.
        """
        from moekit.core.stats_files import save_stats

        save_stats(self, Path(out))

    @classmethod
    def open(cls, path: str | Path) -> ExpertStats:
        """Open the statistics in the directory `path`; the heavy ones are read when asked for.

        Raises UserError for what is no such directory, is damaged, or has another version.
        """
        from moekit.core.stats_files import open_stats

        return open_stats(Path(path))


def merge_all(parts: Iterable[ExpertStats]) -> ExpertStats:
    """Merge in order; raises UserError for no parts, or parts that do not go together."""
    merged: ExpertStats | None = None
    for part in parts:
        merged = part if merged is None else merged.merge(part)
    if merged is None:
        raise UserError("there are no stats to merge.")
    return merged


def _joined(name: str, first: Tensor, second: Tensor) -> Tensor:
    how = STATISTICS[name].combine
    if how == "concat":
        return torch.cat([first, second])
    return first + second if how == "sum" else torch.maximum(first, second)


def _combined(
    name: str,
    values: tuple[Tensor | Lazy, Tensor | Lazy],
    domains: tuple[list[str], list[str]],
    into: list[str],
) -> Tensor | Lazy:
    statistic = STATISTICS[name]
    shapes = [tuple(v.shape) for v in values]
    split = statistic.axes.startswith("G")
    if split:
        shapes = [(len(into), *shape[1:]) for shape in shapes]
    sizes = [shape[1:] for shape in shapes] if statistic.combine == "concat" else shapes
    if sizes[0] != sizes[1]:
        raise UserError(
            f"{name!r} has shape {shapes[0]} in one of the stats, {shapes[1]} in the other."
        )

    shape = shapes[0]
    if statistic.combine == "concat":
        shape = (shapes[0][0] + shapes[1][0], *shape[1:])

    def load() -> Tensor:
        parts = [v.load() if isinstance(v, Lazy) else v for v in values]
        if split:
            parts = [_spread(p, d, into) for p, d in zip(parts, domains, strict=True)]
        return _joined(name, *parts)

    return Lazy(shape, load) if any(isinstance(v, Lazy) for v in values) else load()


def _spread(value: Tensor, domains: list[str], into: list[str]) -> Tensor:
    if domains == into:
        return value
    spread = value.new_zeros(len(into), *value.shape[1:])
    spread[[into.index(d) for d in domains]] = value
    return spread


def layers_of(view: Iterable[Any]) -> list[StatsLayer]:
    """Describe the layers of a `MoEView`."""
    return [StatsLayer(m.index, m.name, m.num_experts, m.num_choices, m.top_k) for m in view]
