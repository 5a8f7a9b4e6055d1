"""The sections of docs/results.md on pruning and on skipping experts at run time."""

import statistics
from collections.abc import Sequence
from typing import Any

from tables import machine, table

Row = dict[str, Any]


def mean_of(row: Row) -> float:
    """The mean over domains of one measurement."""
    return statistics.mean(row["by_domain"].values())


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds."""
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"


def where(rows: list[Row], **label: Any) -> dict[int, Row]:
    """Rows by seed that have these labels."""
    return {row["seed"]: row for row in rows if all(row.get(k) == v for k, v in label.items())}


def verdict(better: dict[int, Row], worse: dict[int, Row]) -> tuple[str, str]:
    """What equal seeds say of "better loses less than worse", and the differences."""
    seeds = sorted(better.keys() & worse.keys())
    gains = [mean_of(worse[seed]) - mean_of(better[seed]) for seed in seeds]
    numbers = ", ".join(f"{gain:+.3f}" for gain in gains)
    if len(gains) > 1 and all(gain > 0 for gain in gains):
        return "**reproduced**", numbers
    if len(gains) > 1 and all(gain < 0 for gain in gains):
        return "**refuted**", numbers
    return "**cannot be seen**" if gains else "not measured", numbers


def compress_prune(record: dict[str, Any]) -> str:
    found, options = record["metrics"], record["options"]
    full = statistics.mean(found["full"].values())
    scores, own = found["scores"], found["own_domain"]
    methods = list(dict.fromkeys(row["method"] for row in scores))
    ratios = sorted({row["ratio"] for row in scores})
    by_ratio = [
        [
            method,
            *(
                spread([mean_of(r) for r in where(scores, method=method, ratio=q).values()])
                for q in ratios
            ),
            spread([mean_of(r) for r in where(own, method=method).values()]),
            spread([mean_of(r) for r in where(found["global"], method=method).values()]),
        ]
        for method in methods
    ]
    for name, rows in (("naee (descent)", found["naee"]), ("eep from reap", found["eep"])):
        values = spread([mean_of(row) for row in rows])
        by_ratio.append([name, *("-" if q != 0.5 else values for q in ratios), "-", "-"])
    shown = [m for m in ("random", "frequency", "reap", "man", "easy-ep") if m in methods]
    domains = [
        [
            domain,
            f"{found['full'][domain]:.3f}",
            *(
                spread(
                    [r["by_domain"][domain] for r in where(scores, method=m, ratio=0.5).values()]
                )
                for m in shown
            ),
        ]
        for domain in sorted(found["full"])
    ]
    parts = [
        "## Pruning babel",
        f"`benchmarks/compress_prune.py`. Bits per byte on `valid`, mean over {len(domains)} "
        f"domains ({options['bytes']:,} bytes of each, windows of {options['context']} tokens), "
        f"mean ± standard deviation over {options['seeds']} calibrations of "
        f"{options['calibration']:,} tokens of `train`, an equal share of each domain, drawn by "
        f"seed ({_incomplete(scores, options['seeds'])}). Nothing is trained afterwards. "
        f"All experts: {full:.3f}. *Own domain*: half of the experts, chosen for each domain on "
        "its part of the "
        f"calibration ({options['calibration'] // len(domains):,} tokens) and measured on it "
        "alone. *Global*: half of the experts of all layers together, by one threshold. `dern` "
        "orders experts as `gate-mass` does. " + machine(record),
        table(
            ["method", *(f"{q:.0%} gone" for q in ratios), "own domain, 50%", "global, 50%"],
            by_ratio,
        ),
        "Half of the experts gone, by domain:",
        table(["domain", "all experts", *shown], domains),
        "What papers say, checked by a rule fixed beforehand: with half of the experts gone, "
        "reproduced if the better one is better under every seed, refuted if it is worse under "
        "every seed, else it cannot be seen. Gains in bits per byte by seed.",
        table(["claim", "verdict", "gains"], _claims(found)),
        _searches(found, options),
        _retrieval(found),
    ]
    return "\n\n".join(parts)


def _incomplete(scores: list[Row], seeds: int) -> str:
    """Which cells of the table lack a seed."""
    cells = dict.fromkeys((row["method"], row["ratio"]) for row in scores)
    few = [
        f"{method} at {ratio:.0%}"
        for method, ratio in cells
        if len(where(scores, method=method, ratio=ratio)) < seeds
    ]
    return f"one fewer for {', '.join(few)}" if few else "all of them in every cell"


def _claims(found: dict[str, Any]) -> list[list[str]]:
    def pooled(method: str) -> dict[int, Row]:
        return where(found["scores"], method=method, ratio=0.5)

    def own(method: str) -> dict[int, Row]:
        return where(found["own_domain"], method=method)

    naee, eep = where(found["naee"], ratio=0.5), where(found["eep"], ratio=0.5)
    claims: list[tuple[str, dict[int, Row], dict[int, Row]]] = [
        ("REAP loses less than EAN (REAP 2510.13999)", pooled("reap"), pooled("ean")),
        ("EAN loses less than frequency (REAP 2510.13999)", pooled("ean"), pooled("frequency")),
        ("REAP loses less than frequency (REAP 2510.13999)", pooled("reap"), pooled("frequency")),
        (
            "For all tasks alike, MAN loses less than REAP (scoring study 2606.15716)",
            pooled("man"),
            pooled("reap"),
        ),
        (
            "For all tasks alike, MAN loses less than frequency (scoring study 2606.15716)",
            pooled("man"),
            pooled("frequency"),
        ),
        (
            "For one task, frequency loses less than MAN (scoring study 2606.15716)",
            own("frequency"),
            own("man"),
        ),
        (
            "For one domain, EASY-EP loses less than gate values (EASY-EP 2504.06792)",
            own("easy-ep"),
            own("gate-mass"),
        ),
        (
            "Calibrating on the domain itself gains more than the best score does over frequency "
            "(REAP 2510.13999): own domain by frequency, best score on all",
            own("frequency"),
            _best(found["scores"]),
        ),
        ("NAEE's search loses less than frequency (NAEE 2402.14800)", naee, pooled("frequency")),
        ("NAEE's search loses less than chance (NAEE 2402.14800)", naee, pooled("random")),
        ("EEP's evolution loses less than its start, REAP (EEP 2407.00945)", eep, pooled("reap")),
        (
            "PreMoe's logits choose better than chance for a task (PreMoe 2505.17639)",
            own("tcess"),
            own("random"),
        ),
    ]
    return [[claim, *verdict(better, worse)] for claim, better, worse in claims]


def _best(scores: list[Row]) -> dict[int, Row]:
    """Of every seed the score that loses least with half of the experts."""
    rows = [row for row in scores if row["ratio"] == 0.5]
    best: dict[int, Row] = {}
    for row in sorted(rows, key=mean_of):
        best.setdefault(row["seed"], row)
    return best


def _searches(found: dict[str, Any], options: dict[str, Any]) -> str:
    lines = [
        f"Searches on {options['search']:,} tokens of the calibration, 50 % gone: NAEE's objective "
        f"by descent, at most {options['evaluations']['naee']} subsets a layer (16 of 32 are too "
        f"many to enumerate); EEP with {options['evaluations']['eep']} models, the first of them "
        "REAP's, half of them mixing."
    ]
    for name in ("naee", "eep"):
        if found[name]:
            seconds = statistics.mean(row["seconds"] for row in found[name])
            tried = statistics.mean(row["evaluations"] for row in found[name])
            lines.append(f"{name.upper()}: {tried:,.0f} evaluations in {seconds:.0f} s.")
    for row in found["eep"]:
        first, subsets, last = (-value / 100 for value in row["fitness"])
        lines.append(
            f"Seed {row['seed']}: {first:.3f} nats a token of its text at the start, {subsets:.3f} "
            f"after subsets, {last:.3f} after mixing."
        )
    return " ".join(lines)


def _retrieval(found: dict[str, Any]) -> str:
    if not found["retrieval"]:
        return ""
    hits = [sum(d == t for d, t in row["tasks"].items()) for row in found["retrieval"]]
    values = spread([mean_of(row) for row in found["retrieval"]])
    wrong = sorted(
        {f"{d} as {t}" for row in found["retrieval"] for d, t in row["tasks"].items() if d != t}
    )
    confused = f" (taken for another: {', '.join(wrong)})" if wrong else ""
    return (
        "Retrieval (PreMoe): the first 512 tokens of each domain's validation text find their own "
        f"domain among {len(found['full'])} in {', '.join(map(str, hits))} cases by seed"
        f"{confused}; with half of the experts, those of the task found, {values} bits per byte."
    )


def dynamic_pruning(record: dict[str, Any]) -> str:
    found, options = record["metrics"], record["options"]
    quality = found["quality"]["rules"]
    times = {row["rule"]: row for row in found.get("speed", {}).get("times", [])}
    whole, base = quality[0], times.get("none")

    def timed(rule: str, name: str) -> str:
        return f"{times[rule][name] / base[name]:.2f}" if base and rule in times else "-"

    rows = [
        [
            row["rule"],
            f"{row['skipped']:.3f}",
            f"{row['mean']:.4f}",
            f"{row['mean'] - whole['mean']:+.4f}",
            timed(row["rule"], "prefill"),
            timed(row["rule"], "decode"),
        ]
        for row in quality
    ]
    absolute = (
        f" None: {base['prefill']:.0f} ms for {options['prefill'][0]} sequences of "
        f"{options['prefill'][1]} tokens, {base['decode']:.1f} ms for a decoded token, "
        "fp32."
        if base
        else ""
    )
    return "\n\n".join(
        [
            "## Skipping experts at run time",
            "`benchmarks/dynamic_pruning.py`. Rules on babel (top 4): `naee Q` skips choices whose "
            "weight is below the Q quantile of second over first; `odp` does so but for the 2 % of "
            "tokens that get most attention times size (`norm`: without attention); `otp K` are "
            f"networks trained for a share K of the choices ({options['steps']} steps of 4 "
            f"sequences of {options['length']} tokens); `chance K` keeps the first and others at "
            "random; `first only` is top 1. Bits per byte on `valid`, mean over domains "
            f"({options['bytes']:,} bytes of each); processor time of one thread as a share of "
            f"that without a rule, medians of {options['repeats']}.{absolute} " + machine(record),
            table(
                ["rule", "choices skipped", "bits per byte", "change", "prefill", "decode"], rows
            ),
            _skipping_claims({row["rule"]: row for row in quality}),
        ]
    )


def _skipping_claims(quality: dict[str, Row]) -> str:
    """What MC-MoE and MC# say of their rules, beside these numbers."""

    def loss(rule: str) -> float:
        return quality[rule]["mean"] - quality["none"]["mean"]

    def told(rule: str) -> str:
        return f"{loss(rule):+.4f} with {quality[rule]['skipped']:.3f} skipped (`{rule}`)"

    lines = [
        "What the papers claim, on one training of the networks. Tokens that get much attention "
        "must keep their experts (MC-MoE 2410.06270): "
        f"{_seen(loss('odp 0.5'), loss('odp 0.5, norm'))}: {told('odp 0.5')}, "
        f"{told('odp 0.5, norm')}, {told('naee 0.5')}.",
        "Trained networks lose less than chance and than a threshold (MC# 2510.10962): "
        f"{_seen(loss('otp 0.75'), min(loss('chance 0.75'), loss('naee 0.25')))}: "
        f"{told('otp 0.75')}, {told('chance 0.75')}, {told('naee 0.25')}; {told('otp 0.5')}, "
        f"{told('chance 0.5')}, {told('naee 0.5')}.",
    ]
    return " ".join(lines)


def _seen(better: float, worse: float) -> str:
    return "**reproduced**" if better < worse else "**refuted**"
