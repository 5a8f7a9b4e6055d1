"""What an expert, or a layer's routing, is worth: the loss without it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moekit.analyze.losses import token_losses
from moekit.analyze.paired import Difference, clustered_mean
from moekit.analyze.reading import blocks
from moekit.analyze.rerun import samples_of
from moekit.analyze.result import Result
from moekit.analyze.super_experts import skipped
from moekit.core.errors import UserError
from moekit.core.layer import MoELayer
from moekit.core.registry import register
from moekit.core.seeds import derive_seed, generator
from moekit.core.trace import RoutingTrace
from moekit.core.view import MoEView

Array = NDArray[np.float64]
WHAT = ("both", "layers", "experts")
ABLATIONS = ("ban", "skip")
CHOICES = ("used", "random")


@dataclass(frozen=True)
class Unit:
    """What is ablated: one expert, or (-1) the routing of a whole layer."""

    position: int
    expert: int


@register(
    "measure",
    "causal-importance",
    title="Loss change when an expert, or a layer's routing, is ablated, by domain",
    paper="C3PO 2504.07964",
    needs=("trace", "weights"),
    limits="One forward pass over the sampled text for each ablation: see `budget`.",
    options={
        "what": "ablate layers, experts or both",
        "ablation": "ban: the router picks another expert; skip: its output is left out",
        "max_tokens": "tokens of the trace to run again, in whole samples spread evenly",
        "budget": "tokens to run in all; decides how many experts are ablated",
        "choose": "which experts where the budget is too small for all: used (most) or random",
        "confidence": "of the intervals",
        "seed": "seed of the random routing and of the random choice",
    },
)
def causal_importance(
    trace: RoutingTrace,
    view: MoEView,
    *,
    what: str = "both",
    ablation: str = "ban",
    max_tokens: int = 2048,
    budget: int = 2**16,
    choose: str = "used",
    confidence: float = 0.95,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Result:
    """Measure the change of the loss (nats a token) under each ablation, on the same tokens.

    A layer's routing is ablated by exchanging the logits of its experts at random for every token,
    so that weights stay and the choice means nothing. `low` and `high` bound the mean of the paired
    differences, with texts as what varies; `detail` has them by domain. `progress` gets (ablations
    done, all). Raises UserError for an unknown setting and for samples of one token.
    """
    _check("what", what, WHAT)
    _check("ablation", ablation, ABLATIONS)
    _check("choose", choose, CHOICES)
    samples = [sample for sample in samples_of(trace, view, max_tokens) if len(sample[0]) > 1]
    if not samples:
        raise UserError("no sample of the trace has two tokens: nothing to predict")
    tokens = sum(len(ids) for ids, _ in samples)
    units, left_out = _units(trace, view, what, ablation, max(1, budget // tokens), choose, seed)
    names = sorted({domain for _, domain in samples})
    counts = np.array([len(ids) - 1 for ids, _ in samples], dtype=np.float64)
    base = sample_losses(view, samples)
    found: list[tuple[Unit, Difference, dict[str, Difference]]] = []
    for number, unit in enumerate(units):
        if progress is not None:
            progress(number, len(units))
        with _ablated(view, unit, ablation, seed):
            change = sample_losses(view, samples) - base
        domains = np.array([domain for _, domain in samples])
        by_domain = {
            name: clustered_mean(change[domains == name], counts[domains == name], confidence)
            for name in names
        }
        found.append((unit, clustered_mean(change, counts, confidence), by_domain))
    rows = [
        (view[u.position].index, _name(u), mean.mean, mean.low, mean.high, *_strongest(domains))
        for u, mean, domains in sorted(found, key=lambda row: -row[1].mean)
    ]
    layers = [(u, mean) for u, mean, _ in found if u.expert < 0]
    notes = [f"{left_out} experts were not ablated: raise budget above {budget}"] * bool(left_out)
    return Result(
        ("layer", "ablated", "loss change", "low", "high", "most in", "there"),
        rows,
        {
            "tokens": tokens,
            "texts": len(samples),
            "loss": float(base.sum() / counts.sum()),
            "ablations": len(units),
            "left_out": left_out,
            "harmful": sum(mean.low > 0 for _, mean, _ in found),
            "helpful": sum(mean.high < 0 for _, mean, _ in found),
            **_critical(view, layers),
        },
        {"domains": names, "units": [_plain(view, *row) for row in found]},
        notes,
    )


def sample_losses(view: MoEView, samples: Sequence[tuple[list[int], str]]) -> Array:
    """The summed loss (nats) of each sample's tokens after its first, [S]."""
    return np.array([float(losses.sum()) for losses in token_losses(view, samples)])


def _check(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UserError(f"{name} is {value!r}; it is one of {', '.join(known)}")


def _units(
    trace: RoutingTrace,
    view: MoEView,
    what: str,
    ablation: str,
    limit: int,
    choose: str,
    seed: int,
) -> tuple[list[Unit], int]:
    """The ablations within the limit, whole layers first, and how many experts are left out."""
    layers = [Unit(layer.position, -1) for layer in view if layer.router_weight is not None]
    layers = [] if what == "experts" else layers
    if what == "layers":
        return layers, 0
    experts = []
    for layer in view:
        # Where no other expert is left there is none to pick instead.
        if ablation == "ban" and layer.num_choices - 1 < layer.top_k:
            continue
        used = np.zeros(layer.num_experts, dtype=np.int64)
        for _, ids in blocks(trace, layer.position):
            used += np.bincount(ids[ids >= 0], minlength=len(used))
        experts += [(int(n), Unit(layer.position, e)) for e, n in enumerate(used)]
    if choose == "used":
        experts.sort(key=lambda row: -row[0])
    else:
        random = np.random.default_rng(derive_seed(seed, "causal-importance"))
        experts = [experts[i] for i in random.permutation(len(experts))]
    room = max(0, limit - len(layers))
    return layers + [unit for _, unit in experts[:room]], max(0, len(experts) - room)


def _ablated(view: MoEView, unit: Unit, ablation: str, seed: int) -> AbstractContextManager[None]:
    if unit.expert < 0:
        source = generator(seed, "causal-importance", unit.position)

        def exchange(layer: MoELayer, logits: Tensor, hidden: Tensor) -> Tensor:
            keys = torch.rand(logits.shape, generator=source).to(logits.device)
            return logits.gather(-1, keys.argsort(-1))

        return view.transform_routing(exchange, layers=[unit.position])
    if ablation == "ban":
        return view.ban_experts({unit.position: [unit.expert]})
    return skipped(view, {(unit.position, unit.expert)})


def _name(unit: Unit) -> str:
    return "routing" if unit.expert < 0 else f"expert {unit.expert}"


def _strongest(by_domain: dict[str, Difference]) -> tuple[str, float]:
    name = max(by_domain, key=lambda key: by_domain[key].mean)
    return name, by_domain[name].mean


def _critical(view: MoEView, layers: list[tuple[Unit, Difference]]) -> dict[str, Any]:
    """The layer whose routing matters most."""
    if not layers:
        return {}
    unit, mean = max(layers, key=lambda row: row[1].mean)
    return {"critical_layer": view[unit.position].index, "critical_change": mean.mean}


def _plain(
    view: MoEView, unit: Unit, mean: Difference, by_domain: dict[str, Difference]
) -> dict[str, Any]:
    def interval(value: Difference) -> list[float]:
        return [value.mean, value.low, value.high]

    return {
        "layer": view[unit.position].index,
        "expert": None if unit.expert < 0 else unit.expert,
        "change": interval(mean),
        "by_domain": {name: interval(value) for name, value in by_domain.items()},
    }
