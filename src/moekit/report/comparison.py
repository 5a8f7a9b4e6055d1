"""What changed between two models, before and after."""

from __future__ import annotations

import numpy as np

from moekit.core.memory import format_bytes
from moekit.report.conclusions import Conclusion, percent
from moekit.report.facts import Facts

Row = tuple[str, str, str, str]


def comparison_rows(before: Facts, after: Facts) -> list[Row]:
    """The numbers both have, as (what, before, after, change)."""
    pairs = (dict(_numbers(before)), dict(_numbers(after)))
    rows = []
    for name, (value, shown) in pairs[0].items():
        if name in pairs[1]:
            other, other_shown = pairs[1][name]
            rows.append((name, shown, other_shown, _change(value, other)))
    return rows


def changes(before: Facts, after: Facts) -> list[Conclusion]:
    """What the second model does differently, in plain words."""
    found = []
    common = sorted(before.bits_per_byte.keys() & after.bits_per_byte.keys())
    if common:
        found.append(_quality(before, after, common))
    one, two = before.usage, after.usage
    if [len(a) for a in one.load] == [len(b) for b in two.load]:
        moved = [
            float(np.abs(a / max(a.sum(), 1) - b / max(b.sum(), 1)).sum() / 2)
            for a, b in zip(one.load, two.load, strict=True)
        ]
        most = int(np.argmax(moved))
        found.append(
            Conclusion(
                f"{percent(float(np.mean(moved)))} of the work moved to other experts",
                f"Most moved in layer {two.layers[most]}: {percent(moved[most])} of its choices."
                + _other_text(before, after),
                "load",
            )
        )
    else:
        experts = [sum(map(len, usage.load)) for usage in (one, two)]
        found.append(
            Conclusion(
                f"{experts[0]} experts before, {experts[1]} after",
                f"In {len(one.layers)} MoE layers before and {len(two.layers)} after.",
                "load",
            )
        )
    return found


def _quality(before: Facts, after: Facts, common: list[str]) -> Conclusion:
    differences = {d: after.bits_per_byte[d] / before.bits_per_byte[d] - 1 for d in common}
    # Of the two means, as the table beside it says, not the mean of the changes.
    means = [np.mean([facts.bits_per_byte[d] for d in common]) for facts in (before, after)]
    mean = float(means[1] / means[0] - 1)
    worst = max(differences, key=lambda domain: differences[domain])
    head = (
        "Quality is unchanged"
        if abs(mean) < 0.001
        else f"{percent(abs(mean))} {'more' if mean > 0 else 'fewer'} bits per byte of text: "
        f"{'worse' if mean > 0 else 'better'}"
    )
    detail = (
        f"The mean over {len(common)} domains; least good for {worst} "
        f"({_signed(differences[worst])})."
    )
    return Conclusion(head, detail, "overview", "warn" if mean > 0.001 else "good")


def _other_text(before: Facts, after: Facts) -> str:
    same = before.usage.domains == after.usage.domains and before.tokens == after.tokens
    return "" if same else " The two were measured on different text, which moves work too."


def _numbers(facts: Facts) -> list[tuple[str, tuple[float, str]]]:
    loads = [load for load in facts.usage.load if load.sum()]
    imbalance = float(np.mean([load.max() / load.mean() for load in loads]))
    experts = sum(map(len, facts.usage.load))
    rows: list[tuple[str, tuple[float, str]]] = []
    if facts.spec is not None:
        size = facts.spec.bytes(facts.bits)
        rows.append(("size as stored", (size, format_bytes(size))))
        rows.append(
            ("active parameters", (facts.spec.params.active, f"{facts.spec.params.active:,}"))
        )
    rows.append(("experts in all layers", (experts, f"{experts:,}")))
    rows.append(("experts never chosen", (len(facts.dead), f"{len(facts.dead):,}")))
    rows.append(("busiest expert over even share", (imbalance, f"{imbalance:.2f}")))
    if facts.bits_per_byte:
        mean = float(np.mean(list(facts.bits_per_byte.values())))
        rows.append(("bits per byte, mean over domains", (mean, f"{mean:.3f}")))
    for measure, key, label in (
        ("specialisation", "mean_bits_above_chance", "bits an expert tells about the domain"),
        ("layer-prediction", "recall", "next layer's experts foretold"),
        ("cache-curve", "lru_at_twice_active", "LRU hits at twice the active experts"),
    ):
        result = facts.results.get(measure)
        value = None if result is None else result.summary.get(key)
        if value is not None:
            rows.append((label, (float(value), f"{float(value):.3f}")))
    return rows


def _change(before: float, after: float) -> str:
    if before == after:
        return "same"
    return _signed(after / before - 1) if before else f"+{after:g}"


def _signed(share: float) -> str:
    return f"{100 * share:+.1f} %"
