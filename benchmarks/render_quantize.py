"""The section of docs/results.md about fewer bits a weight."""

from statistics import mean
from typing import Any

from tables import machine, table

WEIGHTS = 3 * 128 * 256
# Bits per byte below which two results count as the same.
SMALLEST = 0.002
# The key of the one run of what needs no text.
NO_SEED = "-1"
UNIFORM = ("int4-zp", "int3-zp", "int2-zp")

# Claim, paper, (worse, better) cases that it orders.
CLAIMS = [
    *(
        (f"GPTQ is better than rounding at {c[3]} bits", "2210.17323", f"{c} rtn", f"{c} gptq")
        for c in UNIFORM
    ),
    *(
        (f"AWQ is better than rounding at {c[3]} bits", "2306.00978", f"{c} rtn", f"{c} awq")
        for c in UNIFORM
    ),
    *(
        (
            f"One smoothing scale for experts and router is better than rounding at {c[3]} bits",
            "EAQuant 2506.13329",
            f"{c} rtn",
            f"{c} eaquant",
        )
        for c in UNIFORM[:2]
    ),
    (
        "A mix of 1, 2 and 3 bits by the programme is better than 2 bits for all",
        "MC-MoE 2410.06270",
        "int2-zp gptq, ranges searched",
        "2 bits mc-moe",
    ),
    *(
        (
            f"At {bits} bits the programme's mix is better than the same widths dealt at random",
            "MC-MoE 2410.06270",
            f"{bits} bits shuffled",
            f"{bits} bits mc-moe",
        )
        for bits in ("2.5", "2", "1.57")
    ),
    (
        "Ternary rows by GPTQ are better than by rounding",
        "QMoE 2310.16795",
        "ternary-rows rtn",
        "ternary-rows gptq",
    ),
    (
        "Nested planes are worse than plain integers of 4 bits",
        "D2MoE 2504.15299",
        "nested4 gptq, 4 bits",
        "int4-zp gptq",
    ),
]


def compress_quantize(record: dict[str, Any]) -> str:
    found, options = record["metrics"], record["options"]
    plain = found["plain"]["quality"]["mean"]
    cases = {name: list(runs.values()) for name, runs in found["cases"].items() if runs}
    rows = [_row(name, runs, plain) for name, runs in cases.items()]
    parts = [
        "## Fewer bits a weight",
        "`benchmarks/compress_quantize.py`. Every quantizer on babel's experts (16 bits: "
        f"{2 * WEIGHTS:,} bytes each), groups of {options['group_size']}, calibrated on "
        f"{options['tokens']:,} tokens of `train` drawn anew for each run, measured on the first "
        f"{options['bytes']:,} bytes of each domain of `valid` in windows of 512 tokens, float32. "
        f"babel itself has {plain:.4f} bits per byte there; the table has what is added, mean over "
        "the domains, then the mean and the range over the runs. bits: stored for each weight of "
        "an expert, scales included. Ranges searched: a group's range may shrink by half. Dealt: "
        "the widths of MC-MoE's mix given to the experts of a layer at random. " + machine(record),
        table(["method", "bits", "bytes an expert", "added bits per byte", "range", "runs"], rows),
    ]
    coded = [
        [name, f"{8 * mean(r['coded_bytes_per_expert'] for r in runs) / WEIGHTS:.3f}"]
        for name, runs in cases.items()
        if all(run["coded_bytes_per_expert"] for run in runs)
    ]
    if coded:
        parts += [
            "QMoE's dictionary on the ternary rows, with row offsets and levels, bits a weight "
            "(rows here are 128 and 256 wide, so offsets and levels weigh more than in the paper):",
            table(["method", "bits coded"], coded),
        ]
    parts += _domains(cases, found["plain"]["quality"]["bits_per_byte"])
    verdicts = [
        _verdict(*claim, found["cases"])
        for claim in CLAIMS
        if claim[2] in cases and claim[3] in cases
    ]
    parts += [
        "Does each paper's order show here? Differences of added bits per byte between the worse "
        "and the better side of the claim, run by run on one draw of the text. Reproduced or "
        f"refuted where every run says the same by more than {SMALLEST}; otherwise it cannot be "
        "seen at this size.",
        table(["claim", "verdict", "difference by run"], verdicts),
    ]
    return "\n\n".join(parts)


def _added(runs: list[dict[str, Any]], plain: float) -> list[float]:
    return [run["quality"]["mean"] - plain for run in runs]


def _row(name: str, runs: list[dict[str, Any]], plain: float) -> list[str]:
    added = _added(runs, plain)
    size = mean(run["bytes_per_expert"] for run in runs)
    spread = f"{min(added):+.4f} to {max(added):+.4f}" if len(added) > 1 else ""
    return [
        name.replace("shuffled", "dealt at random"),
        f"{8 * size / WEIGHTS:.2f}",
        f"{size:,.0f}",
        f"**{mean(added):+.4f}**",
        spread,
        str(len(runs)),
    ]


def _domains(cases: dict[str, Any], plain: dict[str, float]) -> list[str]:
    shown = [f"{c} {m}" for c in UNIFORM for m in ("rtn", "gptq")]
    shown = [name for name in (*shown, "2 bits mc-moe") if name in cases]
    rows = [
        [
            domain,
            f"{value:.3f}",
            *(
                f"{mean(r['quality']['bits_per_byte'][domain] for r in cases[name]) - value:+.4f}"
                for name in shown
            ),
        ]
        for domain, value in plain.items()
    ]
    header = ["domain", "babel", *shown]
    return ["Added bits per byte by domain, mean over the runs:", table(header, rows)]


def _verdict(
    claim: str, paper: str, worse: str, better: str, cases: dict[str, dict[str, Any]]
) -> list[str]:
    one, two = cases[worse], cases[better]
    # What needs no text has one run, which stands beside every run of the other.
    seeds = sorted({*one, *two} - {NO_SEED}) or [NO_SEED]
    pairs = [(one.get(NO_SEED) or one.get(s), two.get(NO_SEED) or two.get(s)) for s in seeds]
    gaps = [a["quality"]["mean"] - b["quality"]["mean"] for a, b in pairs if a and b]
    if not gaps:
        return [f"{claim} ({paper})", "**not measured**", ""]
    if len(gaps) < 2:
        verdict = "one run only"
    elif all(gap > SMALLEST for gap in gaps):
        verdict = "reproduced"
    elif all(gap < -SMALLEST for gap in gaps):
        verdict = "refuted"
    else:
        verdict = "cannot be seen"
    return [f"{claim} ({paper})", f"**{verdict}**", " ".join(f"{gap:+.4f}" for gap in gaps)]
