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
