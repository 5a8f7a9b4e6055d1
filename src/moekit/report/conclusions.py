"""What a report says in plain words: short conclusions with their numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from moekit.analyze import Result
from moekit.analyze.training_phases import LEAST_SHARE
from moekit.core.memory import format_bytes
from moekit.report.facts import Facts
from moekit.report.usage import NO_LANGUAGE

Tone = Literal["good", "warn", "info"]

# From here on one expert does the work of so many; the busiest of 8 chosen at random has 1.2 or so.
UNEVEN = 3.0
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Conclusion:
    """One statement: a headline, the numbers behind it, and the section that shows them."""

    headline: str
    detail: str
    section: str
    tone: Tone = "info"


def conclusions(facts: Facts) -> list[Conclusion]:
    """Everything that can be said about a model, most important first."""
    makers: list[Callable[[Facts], Conclusion | None]] = [
        _balance,
        _specialisation,
        _languages,
        _token_identity,
        _flow,
        _cache,
        _super_experts,
        _redundancy,
        _pruning,
        _training,
    ]
    return [found for make in makers if (found := make(facts)) is not None]


def percent(share: float) -> str:
    """A share as a percentage; small ones with a digit more."""
    value = 100 * share
    return f"{value:.0f} %" if abs(value) >= 9.95 or value == 0 else f"{value:.1f} %"


def summary_line(facts: Facts) -> str:
    """What the model is, in one sentence."""
    usage = facts.usage
    experts = sorted({len(load) for load in usage.load})
    chosen = sorted(set(usage.top_k))
    what = (
        f"{len(usage.layers)} MoE layers with {_join(experts)} experts each, of which a token uses "
        f"{_join(chosen)}"
    )
    if facts.spec is not None:
        params = facts.spec.params
        what += (
            f"; {_count(params.total)} parameters, {_count(params.active)} of them "
            f"({percent(params.active / params.total)}) at work for a token"
        )
    return what + "."


def _balance(facts: Facts) -> Conclusion:
    loads = [load for load in facts.usage.load if load.sum()]
    imbalance = [float(load.max() / load.mean()) for load in loads]
    mean, worst = float(np.mean(imbalance)), int(np.argmax(imbalance))
    dead = len(facts.dead)
    total = sum(map(len, facts.usage.load))
    layers = [n for n, load in zip(facts.usage.layers, facts.usage.load, strict=True) if load.sum()]
    detail = (
        f"The busiest expert of a layer gets {mean:.1f} times its even share on average; most "
        f"uneven is layer {layers[worst]} with {imbalance[worst]:.1f} times. "
    )
    if dead:
        detail += f"{dead} of {total} experts were never chosen in {facts.tokens:,} tokens."
        head = f"{percent(dead / total)} of the experts are idle on this text"
        return Conclusion(head, detail, "load", "warn")
    detail += f"All {total} experts were chosen at least once in {facts.tokens:,} tokens."
    if mean >= UNEVEN:
        return Conclusion("A few experts do most of the work", detail, "load", "warn")
    return Conclusion("The work is spread over all experts", detail, "load", "good")


def _specialisation(facts: Facts) -> Conclusion | None:
    result = facts.results.get("specialisation")
    if result is None:
        return None
    layers, found = int(result.summary["layers"]), int(result.summary["significant_layers"])
    if not _beyond_chance(found, layers):
        return Conclusion(
            "Experts do not specialise by domain",
            f"The choice of experts tells more about the domain than chance in {found} of {layers} "
            "layers, no more than would be so by accident.",
            "domains",
        )
    strongest = _strongest(result)
    detail = (
        f"In {found} of {layers} layers the choice of experts tells about the domain, more than "
        f"chance would (p ≤ {SIGNIFICANT})."
    )
    if strongest:
        detail += f" Clearest: {strongest}."
    return Conclusion("Experts specialise by domain", detail, "domains", "good")


def _languages(facts: Facts) -> Conclusion | None:
    if facts.languages is None or facts.languages[1] is None:
        return None
    result = facts.languages[1]
    above = [float(row[1]) - float(row[2]) for row in result.rows]
    found = int(result.summary["significant_layers"])
    if not _beyond_chance(found, len(above)):
        return None
    layer = result.rows[int(np.argmax(above))][0]
    strongest = _strongest(result)
    detail = (
        f"Experts separate languages beyond chance in {found} of {len(above)} layers, most in "
        f"layer {layer}."
    )
    if strongest:
        detail += f" Clearest: {strongest}."
    return Conclusion("Languages have their own experts", detail, "languages", "good")


def _beyond_chance(found: int, layers: int) -> bool:
    """Whether so many layers would be significant by accident in fewer than 1 of 20 models."""
    tail = sum(
        math.comb(layers, n) * SIGNIFICANT**n * (1 - SIGNIFICANT) ** (layers - n)
        for n in range(found, layers + 1)
    )
    return tail <= SIGNIFICANT


def _strongest(result: Result) -> str:
    """The pair of expert and domain or language that stands out most."""
    layers = result.column("layer")
    found = [
        (float(item["npmi"]), layer, item)
        for layer, specialists in zip(layers, result.detail["specialists"], strict=True)
        for item in specialists
        if item["domain"] != NO_LANGUAGE
    ]
    if not found:
        return ""
    _, layer, item = max(found, key=lambda entry: entry[0])
    return f"expert {item['expert']} of layer {layer} for {item['domain']}"


def _token_identity(facts: Facts) -> Conclusion | None:
    result = facts.results.get("token-identity")
    if result is None or not result.rows:
        return None
    scores = np.array(result.column("token"), dtype=np.float64)
    layers = result.column("layer")
    if np.isnan(scores).all():
        return None
    high, low = int(np.nanargmax(scores)), int(np.nanargmin(scores))
    mean = float(np.nanmean(scores))
    head = (
        "The word itself mostly decides which experts run"
        if mean >= 0.5
        else "Context matters more than the word itself"
    )
    return Conclusion(
        head,
        f"Two occurrences of one token share {percent(mean)} of their experts beyond chance: from "
        f"{percent(scores[high])} in layer {layers[high]} down to {percent(scores[low])} in layer "
        f"{layers[low]}.",
        "flow",
    )


def _flow(facts: Facts) -> Conclusion | None:
    result = facts.results.get("layer-prediction")
    if result is None:
        return None
    recall, popular = float(result.summary["recall"]), float(result.summary["popular"])
    gain = recall - popular
    head = (
        "One layer's experts foretell the next layer's"
        if gain >= 0.1
        else "One layer's experts say little about the next layer's"
    )
    return Conclusion(
        head,
        f"Guessing from the layer before finds {percent(recall)} of the experts that come next; "
        f"always guessing the most used ones finds {percent(popular)}.",
        "flow",
    )


def _cache(facts: Facts) -> Conclusion | None:
    result = facts.results.get("cache-curve")
    if facts.memory is not None:
        return _memory(facts)
    if result is None or not result.rows:
        return None
    half = next((row for row in result.rows if row[2] >= 0.5), result.rows[-1])
    return Conclusion(
        f"Half of the experts in memory serve {percent(half[3])} of the requests",
        f"With {half[0]} of {facts.usage.num_experts} experts of every layer kept by last use "
        f"(LRU), {percent(half[3])} are there when needed; the best possible choice reaches "
        f"{percent(half[-1])}, and uniform routing would reach {percent(half[2])}.",
        "cache",
    )


def _memory(facts: Facts) -> Conclusion:
    memory = facts.memory
    assert memory is not None
    size = format_bytes(memory.memory)
    if memory.whole:
        return Conclusion(
            f"The whole model fits into {size}",
            f"Its weights take {format_bytes(memory.needed)} as stored; no expert cache is needed.",
            "cache",
            "good",
        )
    if memory.lru is None or memory.read_bytes is None or memory.seconds is None:
        return Conclusion(
            f"{size} are too little for this model as it is stored",
            f"Everything but the routed experts takes {format_bytes(memory.resident)}, and "
            f"{memory.slots} of {memory.num_experts} experts a layer fit beside it: fewer than a "
            "token needs, or no cache curve was measured.",
            "cache",
            "warn",
        )
    return Conclusion(
        f"In {size}, {percent(memory.lru)} of the experts are there when needed",
        f"{memory.slots} of {memory.num_experts} experts a layer fit. The rest costs "
        f"{format_bytes(memory.read_bytes)} of reading a token, {_seconds(memory.seconds)} from a "
        "drive of 2 GB/s. The best possible choice of experts would reach "
        f"{percent(memory.belady or 0)}.",
        "cache",
        "good" if memory.lru >= 0.9 else "info",
    )


def _super_experts(facts: Facts) -> Conclusion | None:
    result = facts.results.get("super-experts")
    if result is None:
        return None
    count = int(result.summary["super_experts"])
    ratio = float(result.summary.get("largest_over_median") or float("nan"))
    if math.isnan(ratio):
        return Conclusion(
            "Experts add nothing",
            "The outputs of half of the experts or more are zero for every token: are the weights "
            "those of a trained model?",
            "super",
            "warn",
        )
    if not count:
        return Conclusion(
            "No super experts",
            "No expert makes massive activations: the largest output of any expert is "
            f"{ratio:.1f} times that of the median one.",
            "super",
        )
    named = ", ".join(f"layer {n} expert {e}" for n, e in result.detail["super_experts"][:6])
    return Conclusion(
        f"{count} super expert{'s' if count > 1 else ''}: never prune, never quantise hard",
        f"{named} make{'s' if count == 1 else ''} the massive activations that attention leans on; "
        f"the largest output is {ratio:.0f} times that of the median expert.",
        "super",
        "warn",
    )


def _redundancy(facts: Facts) -> Conclusion | None:
    result = facts.results.get("redundancy")
    if result is None:
        return None
    pairs = int(result.summary["near_duplicates"])
    weights, outputs = result.summary["mean_weights"], result.summary["mean_outputs"]
    head = f"{pairs} pairs of experts are near duplicates" if pairs else "No two experts are alike"
    return Conclusion(
        head,
        f"Two experts of a layer are {weights:.2f} alike in their weights and {outputs:.2f} in "
        "their outputs on average (1 is the same); the most alike reach "
        f"{result.summary['largest_weights']:.2f} in weights.",
        "redundancy",
        "warn" if pairs else "info",
    )


def _pruning(facts: Facts) -> Conclusion | None:
    if facts.pruning is None or not facts.pruning.cuts:
        return None
    cut = min(facts.pruning.cuts, key=lambda cut: abs(cut.share - 0.25))
    saves = f"They are {cut.experts} experts"
    if cut.saved is not None and facts.pruning.total_bytes:
        part = cut.saved / facts.pruning.total_bytes
        saves += f"; without them the model is {format_bytes(cut.saved)} ({percent(part)}) smaller"
    return Conclusion(
        f"The {percent(cut.share)} of experts that add least add {percent(cut.lost)} of the total",
        f"{saves}. This ranks by {facts.pruning.basis}, on this text; what pruning costs in "
        "quality, moekit eval tells before and after.",
        "pruning",
    )


def _training(facts: Facts) -> Conclusion | None:
    if facts.training is None:
        return None
    losses = [(e["step"], e["loss"]) for e in facts.training.entries if "loss" in e]
    if len(losses) < 2:
        return None
    drift = facts.results.get("routing-drift")
    (_, first), (step, last) = losses[0], losses[-1]
    detail = f"The loss went from {first:.2f} to {last:.2f} in {step} steps."
    if drift is not None:
        settled, final = drift.summary["settled"], drift.column("step")[-1]
        detail += (
            f" At the first probe {percent(drift.summary['first_agreement'])} of the routing was "
            "as at the last"
        )
        detail += (
            f", above 80 % from step {settled} on." if settled < final else "; it still moves."
        )
    phases = facts.results.get("training-phases")
    if phases is not None and "three_phases" in phases.summary:
        found = phases.summary
        noisy = found.get("noise", 0) > LEAST_SHARE * abs(found.get("peak", 0))
        shown = "shows" if found["three_phases"] else "does not show"
        if noisy and not found["three_phases"]:
            shown = "goes up and down too much from probe to probe to tell whether it has"
        detail += f" Its balance {shown} the three phases of surge, plateau and relaxation."
    return Conclusion(f"Trained for {step} steps", detail, "training")


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.2g} ms"


def _count(number: int) -> str:
    for size, unit in ((10**12, "trillion"), (10**9, "billion"), (10**6, "million")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:,}"


def _join(values: list[int]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"
