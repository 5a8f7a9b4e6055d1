"""The sections of docs/results.md on applying plans, and on compressed models in llama.cpp."""

from typing import Any

from tables import machine, table


def load(average: float) -> str:
    """What the load at the end says of the seconds."""
    if average > 2:
        return f"The machine was busy (load {average:.0f} at the end): the seconds say little."
    return f"Load of the machine at the end {average:.0f}."


def compress_apply(record: dict[str, Any]) -> str:
    found = record["metrics"]
    rows = [
        [
            title,
            f"{run['rss_anon_peak'] / 1e6:.0f}",
            f"{run['bytes_read'] / 1e9:.2f}",
            f"{run['bytes_written'] / 1e9:.2f}",
            f"{run['seconds']:.0f}",
            f"{run['yardstick_seconds']:.0f}",
            *(
                f"{run[name]:.0f}" if name in run else "-"
                for name in ("cpu_seconds", "yardstick_cpu_seconds")
            ),
        ]
        for title, run in found["runs"].items()
    ]
    header = ["run", "peak MB", "GB read", "GB written", "seconds", "bytes alone, seconds"]
    header += ["CPU seconds", "bytes alone, CPU seconds"]
    return "\n\n".join(
        [
            "## Applying plans in constant memory",
            "`benchmarks/compress_apply.py`. A checkpoint of "
            f"{found['checkpoint_bytes'] / 1e9:.1f} GB of random bf16 weights loses half of its "
            "experts, and has all of them rounded to 4 bits, packed; the results are compared with "
            "what they must be. Peak of anonymous memory of the process, torch included. Beside "
            "it the time that reading and writing as many bytes takes, made durable as often, "
            f"caches dropped. {load(found['load_average_at_end'])} " + machine(record),
            table(header, rows),
        ]
    )


def compress_gguf(record: dict[str, Any]) -> str:
    found, options = record["metrics"], record["options"]
    rows = []
    for name, kinds in found["models"].items():
        for kind, row in kinds.items():
            if kind == "fp32":
                rows.append([name, "transformers, fp32", "", f"{row['perplexity']:.3f}", ""])
            else:
                rows.append(
                    [
                        name,
                        kind,
                        f"{row['agreement']:.2%}",
                        f"{row['perplexity']:.3f}",
                        f"{row['relative']:+.3%}",
                    ]
                )
    header = ["model", "format", "same best token", "perplexity", "against fp32"]
    return "\n\n".join(
        [
            "## Compressed models in llama.cpp",
            "`benchmarks/compress_gguf.py`. babel with a quarter of its experts pruned, and "
            "condensed to as many, by `moekit compress` at its defaults on "
            f"{int(options['max_tokens']):,} tokens; the GGUF files are written by the plan and "
            f"read by llama-cpp-python {record['versions']['llama-cpp-python']}, teacher-forced on "
            f"{found['tokens']:,} tokens of every domain's `valid`. " + machine(record),
            table(header, rows),
        ]
    )
