"""Profiling: the collecting pass with everything that fills `ExpertStats`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from moekit.core.collect import Batch, Sink, collect
from moekit.core.errors import UserError
from moekit.core.layer import MoELayer
from moekit.core.memory import format_bytes
from moekit.core.port import SeamCall
from moekit.core.seam import replace_backend
from moekit.core.spec import spec_of
from moekit.core.stats import ExpertStats, Lazy, layers_of
from moekit.core.stats_table import STATISTICS
from moekit.core.view import MoEView
from moekit.profile.collector import Collector, ProfiledCall, Sums
from moekit.profile.experts_run import run_routed
from moekit.profile.fisher import add_fisher, fisher_bytes
from moekit.profile.input_moments import InputMoments
from moekit.profile.input_sample import InputSample
from moekit.profile.output_similarity import OutputSimilarity
from moekit.profile.residual import ResidualTap, decoder_layer
from moekit.profile.routing_sums import RoutingSums

DEFAULT = "default"
SETS = (DEFAULT, "diagonal", "full", "outputs", "inputs", "fisher")
HEAVY_BYTES = 2 << 30
SAMPLE = 4096


class ProfileSink:
    """A sink of the collecting pass that runs the experts itself, inside of `attached`."""

    def __init__(self, collectors: Sequence[Collector], positions: Iterable[int]):
        self.sums = Sums()
        self.domains: list[str] = []
        self.positions = sorted(positions)
        self._collectors = collectors
        self._labels: Tensor | None = None
        self._calls: dict[int, SeamCall] = {}

    @contextmanager
    def attached(self, view: MoEView, stop_after: int | None = None) -> Iterator[None]:
        """Compute the experts of the profiled layers here; end forwards after `stop_after`."""
        spec = spec_of(cast(PreTrainedModel, view.model))
        layers = [view[position] for position in self.positions]
        # Only the experts' scale is in the spec; granite also scales what a block adds.
        self._scales = {
            layer.position: spec.per_layer[layer.position].output_scaling
            * float(getattr(decoder_layer(view.model, layer), "residual_multiplier", 1.0))
            for layer in layers
        }
        self._stop_after = stop_after
        self._tap = ResidualTap(view.model, layers)
        with ExitStack() as stack:
            stack.callback(self._tap.close)
            for layer in layers:
                backend = partial(self._run, layer.position)
                stack.enter_context(replace_backend(view, backend, layers=[layer.position]))
            if stop_after is not None:
                stack.enter_context(_stoppable(view.model))
            yield

    # -- the sink --

    def start(self, view: MoEView) -> None:
        self.view = view

    def batch(self, batch: Batch) -> None:
        labels = batch.domains if batch.domains is not None else [""] * len(batch.ids)
        for label in labels:
            if label not in self.domains:
                self.domains.append(label)
        self._labels = torch.tensor([self.domains.index(label) for label in labels])

    def layer(self, call: SeamCall) -> None:
        self._calls[call.layer.position] = call

    def end_batch(self) -> None:
        self._calls.clear()

    def close(self) -> None:
        order = sorted(range(len(self.domains)), key=self.domains.__getitem__)
        for key, value in self.sums.held.items():
            if key[1] in _SPLIT:
                missing = len(order) - len(value)
                value = torch.cat([value, value.new_zeros(missing, *value.shape[1:])])
                self.sums.held[key] = value[order]
        self.domains.sort()

    # -- the backend --

    def _run(
        self, position: int, experts: nn.Module, hidden: Tensor, ids: Tensor, weights: Tensor
    ) -> Tensor:
        seam = self._calls.pop(position)
        call = ProfiledCall(
            seam,
            self._token_domains(seam),
            len(self.domains),
            self._scales[position],
            self._tap.take(seam),
        )
        for collector in self._collectors:
            collector.begin(call)

        def see(rows: Any) -> None:
            for collector in self._collectors:
                collector.rows(call, rows, self.sums)

        update = run_routed(call.layer, hidden, ids, weights, see)
        for collector in self._collectors:
            collector.end(call, update, self.sums)
        if position == self._stop_after:
            raise _Enough
        return update

    def _token_domains(self, call: SeamCall) -> Tensor:
        shape, labels = call.tokens.batch_shape, self._labels
        assert labels is not None
        if shape is None or shape[0] != len(labels):
            if len(self.domains) > 1:
                raise UserError(
                    f"{call.layer.name}: {len(call.hidden)} tokens that are not those of the "
                    "running batch have no domain (are there images in the batch?)."
                )
            domain = torch.zeros(len(call.hidden), dtype=torch.long)
        else:
            domain = labels.repeat_interleave(shape[1])
        domain = domain.to(call.hidden.device)
        return domain if call.mask is None else domain.where(call.mask.bool(), len(self.domains))


_SPLIT = {name for name, statistic in STATISTICS.items() if statistic.axes.startswith("G")}


class _Enough(Exception):
    """All that a pass collects is collected; the rest of the forward would be for nothing."""


@contextmanager
def _stoppable(model: Any) -> Iterator[None]:
    forward = model.forward

    def until_enough(*args: Any, **kwargs: Any) -> Any:
        try:
            return forward(*args, **kwargs)
        except _Enough:
            return None

    model.forward = until_enough
    try:
        yield
    finally:
        del model.forward


def profile(
    view: MoEView,
    batches: Sequence[Batch | Tensor],
    *,
    sets: Iterable[str] = (DEFAULT,),
    layers: Iterable[int] | None = None,
    all_tokens: bool = False,
    kept_share: float = 0.0,
    sample: int = SAMPLE,
    seed: int = 0,
    sinks: Sequence[Sink] = (),
    scratch: Path | None = None,
    heavy_bytes: int = HEAVY_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> ExpertStats:
    """Run the model over `batches` by its own routing rule and return the statistics.

    `sets` are "default" (cheap, one pass with `sinks` beside it), "diagonal" or "full" moments of
    the experts' inputs, "outputs" for the similarity of all experts' outputs, "inputs" for at most
    `sample` of a layer's inputs themselves, and "fisher" for the Fisher information of the weights,
    by backward passes with labels drawn by `seed`. All but the first take as many passes as their
    layers need to stay within `heavy_bytes`; `layers` restricts them to some positions in the view
    and `scratch` is a directory to keep them in. With `all_tokens` input moments are those of every
    token in every expert. `progress` gets (forwards done, all).

    Raises UserError for no data, an unknown set, and what a family does not show.
    """
    wanted = list(dict.fromkeys(sets))
    unknown = [name for name in wanted if name not in SETS]
    if unknown or not wanted:
        raise UserError(f"unknown set {unknown[0]!r}" if unknown else "no set is asked for")
    if {"diagonal", "full"} <= set(wanted):
        # Both count their tokens under one name.
        raise UserError("sets 'diagonal' and 'full' exclude each other; full holds the diagonal.")
    if not len(batches):
        raise UserError("there is no data to profile on: 0 sequences.")
    heavy: list[Any] = []
    if "diagonal" in wanted or "full" in wanted:
        heavy.append(InputMoments("full" in wanted, all_tokens))
    if "outputs" in wanted:
        heavy.append(OutputSimilarity())
    if "inputs" in wanted:
        heavy.append(InputSample(sample, _num_tokens(batches)))

    def heavy_size(layer: Any) -> int:
        return sum(collector.bytes(layer) for collector in heavy)

    groups = _groups(view, heavy_size, layers, heavy_bytes) if heavy else []
    informed = _groups(view, fisher_bytes, layers, heavy_bytes) if "fisher" in wanted else []
    passes = len(groups) + len(informed) + (DEFAULT in wanted)
    done = 0

    def counted() -> Iterator[Batch | Tensor]:
        nonlocal done
        for batch in batches:
            yield batch
            done += 1
            if progress is not None:
                progress(done, passes * len(batches))

    stats: ExpertStats | None = None
    if DEFAULT in wanted:
        routing = RoutingSums(kept_share=kept_share)
        sink = ProfileSink([routing], range(len(view)))
        logits = all(layer.router_weight is not None for layer in view)
        with sink.attached(view):
            collect(view, counted(), [sink, *sinks], logits=logits)
        stats = _stats(view, sink, routing.settings)
    for group in groups:
        sink = ProfileSink(heavy, group)
        with sink.attached(view, stop_after=group[-1]):
            collect(view, counted(), [sink])
        part = _stats(view, sink, {k: v for h in heavy for k, v in h.settings.items()})
        stats = _with(stats, part, scratch)
    for group in informed:
        sink = ProfileSink([], group)
        sink.domains = sorted({label for batch in batches for label in _labels(batch)})
        add_fisher(view, counted(), group, sink.sums, seed)
        stats = _with(stats, _stats(view, sink, {}), scratch)
    assert stats is not None
    if not stats.held:
        raise UserError("no MoE layer was reached by the data, so there is nothing to count.")
    return stats


def _num_tokens(batches: Iterable[Batch | Tensor]) -> int:
    total = 0
    for batch in batches:
        mask = None if isinstance(batch, Tensor) else batch.mask
        ids = batch if isinstance(batch, Tensor) else batch.ids
        total += ids.numel() if mask is None else int(mask.sum())
    return total


def _labels(batch: Batch | Tensor) -> Sequence[str]:
    domains = None if isinstance(batch, Tensor) else batch.domains
    return [""] if domains is None else domains


def _with(stats: ExpertStats | None, part: ExpertStats, scratch: Path | None) -> ExpertStats:
    if scratch is not None:
        _set_aside(part, scratch)
    return part if stats is None else stats.join(part)


def _groups(
    view: MoEView,
    size_of: Callable[[MoELayer], int],
    layers: Iterable[int] | None,
    limit: int,
) -> list[list[int]]:
    """Runs of layers whose heavy statistics fit into `limit` bytes together."""
    positions = sorted(set(range(len(view)) if layers is None else layers))
    outside = [p for p in positions if not 0 <= p < len(view)]
    if outside or not positions:
        raise UserError(f"there are MoE layers 0 to {len(view) - 1}, not {outside or 'none'}.")
    groups: list[list[int]] = []
    used = 0
    for position in positions:
        size = size_of(view[position])
        if size > limit:
            raise UserError(
                f"{view[position].name}: the statistics asked for need {format_bytes(size)}, "
                f"more than the {format_bytes(limit)} they may use."
            )
        if groups and used + size <= limit:
            groups[-1].append(position)
            used += size
        else:
            groups.append([position])
            used = size
    return groups


def _stats(view: MoEView, sink: ProfileSink, settings: dict[str, Any]) -> ExpertStats:
    return ExpertStats(
        cast(PreTrainedModel, view.model).config.model_type,
        layers_of(view),
        sink.domains,
        settings,
        held={key: value.cpu() for key, value in sink.sums.held.items()},
    )


def _set_aside(stats: ExpertStats, scratch: Path) -> None:
    """Move statistics from memory into one file of `scratch`, to be read when asked for."""
    first, name = min(stats.held)
    path = scratch / f"heavy-{first:05d}-{name}.safetensors"
    tensors = {f"{p}.{name}": value for (p, name), value in stats.held.items()}
    save_file({k: v.contiguous() for k, v in tensors.items() if isinstance(v, Tensor)}, path)
    for (p, name), value in stats.held.items():
        stats.held[p, name] = Lazy(tuple(value.shape), partial(_one_of, path, f"{p}.{name}"))


def _one_of(path: Path, key: str) -> Tensor:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(key)
