"""Sections of docs/results.md about running models, for `render.py`."""

from typing import Any

from tables import machine, table


def gguf_llama_cpp(record: dict[str, Any]) -> str:
    found, options, versions = record["metrics"], record["options"], record["versions"]
    rows = [
        [
            f"{name}, {kind}",
            f"{row['bytes'] / 1e6:,.0f}",
            f"{row['agreement']:.2%}",
            f"{row['perplexity']:.3f}",
            f"{row['relative']:+.3%}",
        ]
        for name, kinds in found["models"].items()
        for kind, row in kinds.items()
        if kind != "fp32"
    ]
    exact = next(iter(found["models"].values()))["fp32"]["perplexity"]
    return "\n\n".join(
        [
            "## babel as GGUF in llama.cpp",
            "`benchmarks/gguf_llama_cpp.py`. `moekit convert --to gguf` of babel and of babel with "
            f"experts of {options['width']:,} neurons that compute the same "
            f"(`benchmarks/widen.py`), run by llama-cpp-python {versions['llama-cpp-python']} with "
            f"its default key-value cache in f16, over {found['tokens']:,} tokens of `valid` in "
            f"windows of {options['context']}. Agreement: tokens whose best prediction is that of "
            f"transformers in fp32 (perplexity {exact:.3f}). " + machine(record),
            table(["model, format", "MB", "agreement", "perplexity", "against fp32"], rows),
        ]
    )


def run_in_memory(record: dict[str, Any]) -> str:
    found, options, versions = record["metrics"], record["options"], record["versions"]
    rows = [
        [
            name,
            f"**{row['decode_ms']:.2f}**",
            f"{row['prefill_tokens_per_second']:.0f}",
            f"{row['opening_seconds']:.1f}",
            f"{row['memory']['VmHWM'] / 1e9:.2f}",
        ]
        for name, row in found["programs"].items()
    ]
    pairs = [
        [name, f"{row['decode']:.2f}", f"{row['prefill']:.2f}"]
        for name, row in found["ratios"].items()
    ]
    parts = [
        f"## Everything in memory, {options['shape'].upper()}",
        "`benchmarks/run_in_memory.py`. The shape (`benchmarks/reference_shapes.py`) with random "
        "weights, one sequence, two threads each, the programs in turns: a prompt of "
        f"{options['prompt']} tokens, then {options['steps']} tokens one by one (their median). "
        f"Medians over {options['rounds']} rounds, ratios round by round. int4: experts, "
        "attention and output head in groups of 32, as Q4_0 has them. GB is the peak of what "
        "the process held, mapped files "
        f"included. llama-cpp-python {versions['llama-cpp-python']}; " + machine(record),
        table(["program", "ms a token", "prefill tokens/s", "opening s", "GB"], rows),
        "How many times as fast:",
        table(["pair", "decode", "prefill"], pairs),
    ]
    if "check" in found:
        check = "; ".join(f"{name} {value:.4f}" for name, value in found["check"].items())
        parts.append(
            "Before, on the same weights: median over tokens of the relative distance of logits. "
            f"{check}."
        )
    return "\n\n".join(parts)


def run_larger_than_memory(record: dict[str, Any]) -> str:
    found, options, versions = record["metrics"], record["options"], record["versions"]
    rows = [
        [
            share,
            f"{row['prefetch_on']['limit'] / 1e6:,.0f}",
            f"{row['hit_rate']:.3f}",
            f"{row['belady']:.3f}",
            f"**{row['share_of_belady']:.2f}**",
            f"{row['prefetch_off']['tokens_per_second']:.1f}",
            f"**{row['prefetch_on']['tokens_per_second']:.1f}**",
            f"{row['disk_bandwidth'] / 1e9:.2f}",
            f"{row['time_ratio']:.2f}",
            f"{row['bytes_ratio']:.2f}",
        ]
        for share, row in found["rows"].items()
    ]
    peers = [
        [
            share,
            f"{row['prefetch_on']['peak_charge'] / 1e6:,.0f}",
            _rate(row["llama"]),
            row["llama"].get("tokens", 0),
            f"{row['llama']['peak_charge'] / 1e6:,.0f}",
            row["llama_repacked"].get("ended") or _rate(row["llama_repacked"]),
        ]
        for share, row in found["rows"].items()
    ]
    whole = found["all_in_memory"]
    return "\n\n".join(
        [
            "## Larger than memory, real routing",
            "`benchmarks/run_larger_than_memory.py`. babel with experts of "
            f"{options['width']:,} neurons that compute the same (`benchmarks/widen.py`): "
            f"{found['expert_record'] / 1e6:.1f} MB an expert at 4 bits, "
            f"{found['expert_bytes'] / 1e9:.2f} GB in all. {options['documents']} texts of "
            f"{options['length']} tokens of `valid`, decoded token by token, the cache empty at "
            "first. The process is in a memory cgroup limited to the sum that the engine prints. "
            "Hit rate: demand hits with prefetch off, and those of Belady's optimum with as many "
            "slots. Time: with prefetch, over the larger of computing with everything in memory "
            f"({whole['tokens_per_second']:.1f} tokens/s) and reading at the disk's speed what is "
            "read without prefetch; the speed is that of several experts read together, checksums "
            "verified, measured before, between and after the texts. Bytes: with prefetch over "
            "without. " + machine(record),
            table(
                [
                    "experts in memory",
                    "limit MB",
                    "hit rate",
                    "Belady",
                    "share",
                    "tokens/s, no prefetch",
                    "tokens/s",
                    "disk GB/s",
                    "time",
                    "bytes",
                ],
                rows,
            ),
            f"llama-cpp-python {versions['llama-cpp-python']} with the same model as Q4_0, memory "
            "mapped, in a cgroup with the same limit, its weights as they lie in the file; the "
            "peak is what the cgroup was charged, page cache included. By default it repacks its "
            "weights into memory of its own: the last column says how that ended, by the limit or "
            f"after {options['patience']:.0f} seconds.",
            table(
                [
                    "experts in memory",
                    "moekit's peak MB",
                    "llama.cpp tokens/s",
                    "over tokens",
                    "its peak MB",
                    "llama.cpp by default",
                ],
                peers,
            ),
        ]
    )


def _rate(row: dict[str, Any]) -> str:
    return f"{row['tokens_per_second']:.2f}" if "tokens_per_second" in row else "none"


def serve_streams(record: dict[str, Any]) -> str:
    found = record["metrics"]
    rows = [
        [
            name,
            f"{row['one_stream']['tokens_per_second']:.0f}",
            f"{row['one_stream']['first_token_ms_median']:.0f}",
            f"**{row['streams']['tokens_per_second']:.0f}**",
            f"{row['streams']['first_token_ms_median']:.0f}",
            f"{row['streams']['between_tokens_ms_median']:.0f}",
            f"{row['streams']['between_tokens_ms_99']:.0f}",
            f"**{row['ratio']:.1f}**",
        ]
        for name, row in found["rows"].items()
    ]
    header = ["server", "one: tokens/s", "first ms", "32: tokens/s", "first ms"]
    header += ["between ms", "99 % ms", "32 over one"]
    return "\n\n".join(
        [
            "## 32 clients of one server",
            "`benchmarks/serve_streams.py`. `moekit serve babel`: completions of 96 sampled tokens "
            "streamed over HTTP, to one client at a time and to 32 together, each with its own "
            "prompt and seed; the texts are equal. Milliseconds to the first token and between "
            "two, medians over the clients, and what 99 % of the gaps stay under. The clients "
            f"share the processors (load {found['load_average']:.1f} at the end). "
            f"{machine(record)}",
            table(header, rows),
        ]
    )
