"""Sections of docs/results.md about the engine's memory and its forecast, for `render.py`."""

from typing import Any

from tables import machine, table


def run_memory(record: dict[str, Any]) -> str:
    rows = [
        [
            f"{row['runner']}, {row['share']:.0%}, {row['streams']}",
            *(f"{row['without_limit']['memory'][part] / 1e6:.0f}" for part in PARTS),
            f"{row['without_limit']['limit'] / 1e6:.0f}",
            f"{row['without_limit']['peak_charge'] / 1e6:.0f}",
            f"{row['with_limit']['peak_charge'] / 1e6:.0f}",
        ]
        for row in record["metrics"]["rows"]
    ]
    header = ["runner, experts, streams", *(part.replace("_", " ") for part in PARTS)]
    return "\n\n".join(
        [
            "## Memory of the engine",
            "`benchmarks/run_memory.py`. `open_engine` on random weights of the reference shape R1 "
            f"at 4 bits ({record['metrics']['expert_bytes'] / 1e6:.0f} MB of experts), a prompt of "
            "300 tokens and 40 decoded ones, in MB: the rows that the engine prints, their sum, "
            "the peak charge of a memory cgroup without a limit (page cache and kernel included), "
            "and that of one whose limit was the sum, where every run finished. The machine was "
            "busy. " + machine(record),
            table([*header, "sum", "peak charge", "peak at the limit"], rows),
        ]
    )


def run_uniform_routing(record: dict[str, Any]) -> str:
    rows = [
        [
            name,
            run["tokens"],
            f"{run['opening_seconds']:.1f}",
            f"**{run['tokens_per_second']:.2f}**",
            f"{run['full_tokens_per_second']:.2f}",
            f"{run['hit_rate']:.0%}",
            f"{run['bytes_read'] / run['tokens'] / 1e6:.0f}",
            f"{run['budget']['expert_cache'] / run['budget']['all_experts']:.0%}",
            f"{run['peak_charge'] / 1e9:.2f}",
        ]
        for name, runs in record["metrics"]["rows"].items()
        for run in runs
    ]
    header = ["limit", "tokens", "opening s", "tokens/s", "second half", "found", "MB a token"]
    return "\n\n".join(
        [
            f"## Larger than memory, uniform routing, {record['options']['shape'].upper()}",
            "`benchmarks/run_uniform_routing.py`. The shape with random weights at 4 bits, two "
            "threads, each token's experts drawn uniformly at random in the place of those that "
            "the routers chose: the worst case. All tokens from the first, which finds an empty "
            "cache, and the second half of them. Each run is a process of its own in a memory "
            "cgroup, the first of a limit without one, the others with it; the peak is what the "
            "cgroup was charged, page cache included. " + machine(record),
            table([*header, "experts in memory", "peak GB"], rows),
        ]
    )


def opening(record: dict[str, Any]) -> str:
    rows = [
        [
            name,
            f"{row['rounds'][0]['stored_bytes'] / 1e9:.2f}",
            f"{row['reading']:.2f}",
            f"{row['rounds'][0]['stored_bytes'] / row['reading'] / 1e9:.2f}",
            f"**{row['opening']:.2f}**",
        ]
        for name, row in record["metrics"]["rows"].items()
    ]
    return "\n\n".join(
        [
            "## Opening",
            "`benchmarks/opening.py`. A packed model with the resident part of R2 and 8 experts a "
            "layer, opened by a process that has imported its libraries, past the page cache: "
            "reading the resident part alone, checksums verified, and opening the model, in "
            f"seconds, medians of {record['options']['rounds']}. Encoded: attention and output "
            f"head in {record['options']['codec']}; the logits of the last two rows are equal. "
            + machine(record),
            table(["resident part", "GB", "read s", "GB/s", "opening s"], rows),
        ]
    )


def pack_memory(record: dict[str, Any]) -> str:
    rows = [
        [
            f"{row['checkpoint_bytes'] / 1e9:.1f}",
            f"{row['packed_bytes'] / 1e9:.1f}",
            f"**{row['rss_anon_peak'] / 1e6:.0f}**",
            f"{row['above_import'] / 1e6:.0f}",
            f"{row['seconds']:.0f}",
            row["tensors_compared"],
        ]
        for row in record["metrics"]["rows"]
    ]
    header = ["checkpoint GB", "packed GB", "peak MB", "above import MB", "seconds"]
    return "\n\n".join(
        [
            "## Packing in constant memory",
            "`benchmarks/pack_memory.py`. Random bf16 checkpoints of more and more layers are "
            f"packed with {record['options']['codec']}, attention and output head too. Peak of "
            "anonymous memory (RssAnon) of the process, and above that after import; matrices "
            "whose packed bytes were compared with encoding the checkpoint's own. The machine was "
            f"busy (load {record['metrics']['load_average_at_end']:.0f} at the end), so the "
            "seconds say little. " + machine(record),
            table([*header, "compared"], rows),
        ]
    )


PARTS = ("program", "resident_part", "kv_cache", "scratch", "overhead", "expert_cache")


def run_forecast(record: dict[str, Any]) -> str:
    rows = [
        [
            f"{row['runner']}, {row['share']:.0%}",
            f"{row['hit_rate']:.0%}",
            f"{row['expected_hit_rate']:.0%}",
            f"{row['measured']:.1f}",
            f"{row['forecast']:.1f}",
            f"{row['ratio']:.2f}",
            f"{min(row['ratios']):.2f} to {max(row['ratios']):.2f}",
        ]
        for row in record["metrics"]["rows"]
    ]
    return "\n\n".join(
        [
            "## Forecast of decoding",
            "`benchmarks/run_forecast.py`. babel with experts widened to "
            f"{record['options']['width']:,} neurons at 4 bits, {record['options']['threads']} "
            "threads, decoding validation text one token after the other with a share of the "
            "experts in memory: how many of those asked for were there, how many a trace of "
            "training text led to expect, tokens a second (of "
            f"{record['options']['repeats']} runs that with the middle ratio), and the forecast of "
            "`moekit run --dry-run --trace` just before it. " + machine(record),
            table(
                [
                    "runner, experts",
                    "found",
                    "expected",
                    "tokens/s",
                    "forecast",
                    "ratio",
                    "range",
                ],
                rows,
            ),
        ]
    )
