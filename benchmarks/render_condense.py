"""The section of docs/results.md on merging and factorising experts."""

from statistics import mean, stdev
from typing import Any

from condense_claims import judge, rows_by_case
from tables import machine, table

SHOWN = (
    ("prune", "reap"),
    ("merge", "dern"),
    ("merge", "fisher-merge"),
    ("merge", "hc-smoe"),
    ("factorize", "svd-white"),
    ("factorize", "molae-white"),
)


def compress_condense(record: dict[str, Any]) -> str:
    found, options = record["metrics"], record["options"]
    rows = rows_by_case(found["rows"])
    ratios = sorted({ratio for _, _, ratio in rows})
    full = found["full"]
    seeds = sorted({row["seed"] for row in found["rows"]})
    parts = [
        "## Merging and factorising experts",
        "`benchmarks/compress_condense.py`. babel's 32 experts a layer, merged, pruned, or "
        "factorised until 25, 50 or 75 % of their bytes are gone: bits per byte on `valid`, mean "
        f"of 15 domains, over the leading {options['bytes']:,} bytes of each ({full['tokens']:,} "
        f"tokens; {full['bpb']:.4f} whole, bf16). Mean and standard deviation over "
        f"{len(seeds)} calibrations of {options['calibration']:,} tokens of `train`"
        + ("" if found["complete"] else ", as far as the run has come")
        + ". Nothing is trained. Merged experts keep every row of the router unless the name says "
        "otherwise, so their bytes are those of `--to packed`. " + machine(record),
        _by_ratio(rows, ratios, ("prune", "merge")),
        "Factors, at the rank whose numbers fit (without calibration nothing varies; mole keeps "
        "down whole and cannot save 75 %):",
        _by_ratio(rows, ratios, ("factorize",)),
        "By domain, half of the bytes gone:",
        _by_domain(found),
        "What papers claim. Differences in bits per byte, positive where the claim holds (standard "
        "deviation over calibrations), at " + ", ".join(f"{ratio:.0%}" for ratio in ratios) + ". "
        "Reproduced: beyond the deviation at every ratio measured; refuted: against it so; else it "
        "cannot be seen. The papers' models are a hundred times larger, and some of them train "
        "afterwards.",
        _claims(rows),
    ]
    return "\n\n".join(parts)


def _by_ratio(rows: Any, ratios: list[float], kinds: tuple[str, ...]) -> str:
    names = sorted({(kind, method) for kind, method, _ in rows if kind in kinds})
    last = max(ratios)

    def place(name: tuple[str, str]) -> float:
        at = [mean(rows[(*name, r)].values()) for r in (0.5, last) if (*name, r) in rows]
        return at[0] if at else 99.0

    lines = []
    for kind, method in sorted(names, key=place):
        cells = [_spread(rows.get((kind, method, ratio))) for ratio in ratios]
        lines.append([f"{kind}: {method}" if len(kinds) > 1 else method, *cells])
    return table(["", *(f"{ratio:.0%} gone" for ratio in ratios)], lines)


def _spread(values: dict[int, float] | None) -> str:
    if not values:
        return ""
    found = list(values.values())
    return f"{mean(found):.3f}" + (f" ± {stdev(found):.3f}" if len(found) > 1 else "")


def _by_domain(found: dict[str, Any]) -> str:
    domains = sorted(found["full"]["by_domain"])
    columns = []
    for kind, method in SHOWN:
        rows = [
            row["by_domain"]
            for row in found["rows"]
            if (row["kind"], row["method"], row["ratio"]) == (kind, method, 0.5) and row["bpb"]
        ]
        if rows:
            columns.append((method, {d: mean(row[d] for row in rows) for d in domains}))
    lines = [
        [domain, f"{found['full']['by_domain'][domain]:.3f}"]
        + [f"{values[domain]:.3f}" for _, values in columns]
        for domain in domains
    ]
    return table(["domain", "whole", *(name for name, _ in columns)], lines)


def _claims(rows: Any) -> str:
    lines = []
    for claim in judge(rows):
        cells = [
            f"{ratio:.0%}: {centre:+.3f} ({spread:.3f})"
            for ratio, (centre, spread) in claim["differences"].items()
        ]
        lines.append(
            [f"{claim['claim']} ({claim['paper']})", f"**{claim['verdict']}**", "; ".join(cells)]
        )
    return table(["claim", "verdict", "difference"], lines)
