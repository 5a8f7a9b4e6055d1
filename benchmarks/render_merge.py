"""The sections of docs/results.md about merging, for `render.py`."""

from typing import Any

from claims import Claim, claims_table
from tables import machine, table

CLAIMS: tuple[Claim, ...] = (
    (
        "Trimming before the signs are elected helps",
        "TIES 2306.01708",
        "ties without trimming",
        "ties (paper)",
    ),
    (
        "Electing signs beats adding task vectors",
        "TIES 2306.01708",
        "task_arithmetic 0.3",
        "ties (paper)",
    ),
    ("Electing signs beats the average", "TIES 2306.01708", "linear", "ties (paper)"),
    (
        "Adding task vectors beats the average",
        "Task arithmetic 2212.04089",
        "linear",
        "task_arithmetic 0.3",
    ),
    (
        "Dropping at random and rescaling costs nothing",
        "DARE 2311.03099",
        "task_arithmetic 0.3",
        "dare_linear",
    ),
    ("Dropping by magnitude beats dropping at random", "DELLA 2406.11617", "dare_ties", "della"),
    (
        "Leaving out the largest changes helps",
        "Breadcrumbs 2312.06795",
        "task_arithmetic 0.3",
        "breadcrumbs",
    ),
    ("Competition in and between tasks beats signs", "PCB 2410.02396", "ties (paper)", "pcb"),
    ("Weighting by Fisher information beats the average", "Fisher 2111.09832", "linear", "fisher"),
    ("Regression on inputs beats the average", "RegMean 2212.09849", "linear", "regmean"),
    (
        "Orthogonal singular vectors beat task vectors",
        "TSV-M 2412.00081",
        "task_arithmetic 0.3",
        "tsv_m",
    ),
    ("Equal singular values beat task vectors", "Iso-C 2502.04959", "task_arithmetic 0.3", "iso_c"),
    ("Magnitude and direction apart beat the average", "WIDEN 2408.03092", "linear", "widen"),
    (
        "The distance of fine-tunes sets the best average",
        "Model stock 2403.19522",
        "linear",
        "model_stock",
    ),
    (
        "Learned coefficients beat fixed ones",
        "AdaMerging 2310.02575",
        "task_arithmetic 0.3",
        "adamerging (entropy)",
    ),
    (
        "Cross-entropy is a better guide than entropy",
        "not claimed",
        "adamerging (entropy)",
        "adamerging (cross-entropy)",
    ),
    (
        "Frank-Wolfe steps beat task vectors",
        "FW-Merging 2503.12649",
        "task_arithmetic 0.3",
        "fw_hard",
    ),
    ("Search beats the average", "Unconstrained 2410.13699", "linear", "search of linear"),
    (
        "Search beats one coefficient for all",
        "Unconstrained 2410.13699",
        "task_arithmetic 0.3",
        "search of task_arithmetic",
    ),
)
METHODS = {"linear": "`linear`, all three", "ties": "`ties`, density 0.5"}


def merge_speed(record: dict[str, Any]) -> str:
    found = record["metrics"]
    runs, equal = found["runs"], found["equal"]
    rows = [
        [
            METHODS[method],
            f"{runs['mergekit'][method]['seconds']:.1f}",
            f"**{runs['moekit'][method]['seconds']:.1f}**",
            f"**{found['ratios'][method]:.1f}**",
            f"{found['targets'][method]:g}",
            f"{runs['mergekit'][method]['above_import'] / 1e9:.2f}",
            f"**{runs['moekit'][method]['above_import'] / 1e9:.2f}**",
        ]
        for method in METHODS
    ]
    times = "; ".join(
        f"{tool} {method} {', '.join(f'{one:g}' for one in runs[tool][method]['all_seconds'])}"
        for tool in ("moekit", "mergekit")
        for method in METHODS
    )
    ties = equal["ties"]
    size = found["checkpoint_bytes"] / 1e9
    return "\n\n".join(
        [
            f"## Merging beside mergekit, checkpoints of {size:.1f} GB",
            f"`benchmarks/merge_speed.py`. A base and two fine-tunes of {found['parameters']:,} "
            "random parameters each, bf16, merged in bf16 by mergekit 0.1.5 and by moekit, each "
            "time in a process of its own, from the page cache where it holds the files; medians, "
            "the import not counted. moekit's result is on the disk when it ends (fsync). Peak: "
            "anonymous memory (RssAnon) above that after import, sampled every 5 ms. Checked "
            f"before any time was written: linear is equal in all {equal['linear']['entries']:,} "
            f"entries; of TIES {ties['differ']:,} entries ({ties['differ'] / ties['entries']:.2%}) "
            "differ, all of them where a magnitude equals its threshold and not all that do can "
            "stay. " + machine(record),
            table(
                [
                    *("merge", "mergekit s", "moekit s", "times as fast", "target"),
                    *("mergekit peak GB", "moekit peak GB"),
                ],
                rows,
            ),
            f"All seconds: {times}.",
        ]
    )


def merge_babel(record: dict[str, Any]) -> str:
    found, options = record["metrics"], record["options"]
    domains = [name for name in found["base"] if name != "others"]
    columns = [*domains, "others"]
    by_method: dict[str, list[dict[str, float]]] = {}
    for row in found["merged"]:
        by_method.setdefault(row["method"], []).append(row["by_domain"])
    seconds = {row["method"]: row["seconds"] for row in found["merged"]}
    own = {
        domain: [r["by_domain"][domain] for r in found["tuned"] if r["domain"] == domain]
        for domain in domains
    }
    rows = [
        ["babel", _mean([found["base"]], domains), *(f"{found['base'][c]:.3f}" for c in columns)],
        [
            "each fine-tune on its own",
            f"{sum(_average(values) for values in own.values()) / len(own):.4f}",
            *(f"{_average(own[domain]):.3f}" for domain in domains),
            "",
        ],
    ]
    order = sorted(by_method, key=lambda name: float(_mean(by_method[name], domains)))
    for name in order:
        seeds = by_method[name]
        spread = [sum(one[d] for d in domains) / len(domains) for one in seeds]
        shown = f"**{_mean(seeds, domains)}** ({min(spread):.4f} to {max(spread):.4f})"
        cells = [f"{_average([one[column] for one in seeds]):.3f}" for column in columns]
        rows.append([f"{name}, {seconds[name]:.0f} s", shown, *cells])
    losses: dict[str, dict[int, float]] = {}
    for row in found["merged"]:
        value = _average([row["by_domain"][domain] for domain in domains])
        losses.setdefault(row["method"], {})[row["seed"]] = value
    seeds_run = {row["seed"] for row in found["merged"]}
    return "\n\n".join(
        [
            "## Fine-tunes of babel, merged",
            f"`benchmarks/merge_babel.py`. babel fine-tuned on {len(domains)} domains "
            f"({options['steps']} steps of {options['batch']} sequences of {options['context']} "
            "tokens each), and the four merged by every method with its defaults or as named. Bits "
            f"per byte on the leading {options['bytes']:,} bytes of each domain of `valid`: mean "
            f"over the four (range over {len(seeds_run)} seeds), each of them, and the mean of all "
            f"other domains. Methods that learn read {options['calibration']:,} tokens of "
            f"each domain of `train`. " + machine(record),
            table(["merge", "mean", *columns], rows),
            "What papers claim: what the better side gains in the mean of the four domains, seed "
            "by seed (standard error); reproduced or refuted where it is beyond two standard "
            "errors.",
            claims_table(CLAIMS, losses),
        ]
    )


def _average(values: list[float]) -> float:
    return sum(values) / len(values)


def _mean(seeds: list[dict[str, float]], domains: list[str]) -> str:
    return f"{_average([one[domain] for one in seeds for domain in domains]):.4f}"


def merge_twins(record: dict[str, Any]) -> str:
    """Models that do not share their order of units."""
    found: dict[tuple[str, str], dict[int, list[float]]] = {}
    for row in record["metrics"]["rows"]:
        own = found.setdefault((row["kind"], row["name"]), {})
        own.setdefault(row["seed"], []).append(row["loss"])
    rows = [
        [kind, name, f"{_average([_average(v) for v in seeds.values()]):.3f}"]
        + [f"{_average(losses):.3f}" for losses in seeds.values()]
        for (kind, name), seeds in found.items()
    ]
    losses = {
        f"{kind} {name}": {seed: _average(values) for seed, values in seeds.items()}
        for (kind, name), seeds in found.items()
    }
    claims = (
        (
            "Matching units helps",
            "PLeaS 2407.02447",
            "dense average by index",
            "dense PLeaS, same width",
        ),
        (
            "More width helps further",
            "PLeaS 2407.02447",
            "dense PLeaS, same width",
            "dense PLeaS, half of the neurons kept apart",
        ),
        ("Aligning experts helps", "own", "MoE average by index", "MoE average of aligned experts"),
    )
    return "\n\n".join(
        [
            "## Twins merged",
            "`benchmarks/merge_twins.py`. Dense: models trained from different initial weights on "
            "the same kind of text. MoE: two grown from one dense model, half of every expert's "
            "neurons drawn anew by different seeds, then trained for "
            f"{record['options']['steps']} steps on other windows each. Averages of the two; "
            "held-out loss in nats a token, mean and by pair. " + machine(record),
            table(
                ["models", "merge", "mean", *(f"pair {n}" for n in range(len(rows[0]) - 3))], rows
            ),
            claims_table(claims, losses),
        ]
    )
