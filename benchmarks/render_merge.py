"""The sections of docs/results.md about merging, for `render.py`."""

from typing import Any

from tables import machine, table

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
        ]
    )


def _average(values: list[float]) -> float:
    return sum(values) / len(values)


def _mean(seeds: list[dict[str, float]], domains: list[str]) -> str:
    return f"{_average([one[domain] for one in seeds for domain in domains]):.4f}"
