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
            f"{row['forecast_uniform']:.1f}",
        ]
        for row in record["metrics"]["rows"]
    ]
    return "\n\n".join(
        [
            "## Forecast of decoding",
            "`benchmarks/run_forecast.py`. Decoding random tokens on random weights of the "
            f"reference shape R1 at 4 bits, {record['options']['threads']} threads, with a share "
            "of the experts in memory: how many of those asked for were there and how many a "
            "replayed trace of other tokens led to expect; tokens a second, and the forecasts with "
            "that hit rate and for routing that never repeats itself. What a layer takes besides "
            "its bytes, and how much of reading overlaps, were fitted on these settings. "
            + machine(record),
            table(
                [
                    "runner, experts",
                    "found",
                    "expected",
                    "tokens/s",
                    "forecast",
                    "ratio",
                    "forecast, uniform",
                ],
                rows,
            ),
        ]
    )
