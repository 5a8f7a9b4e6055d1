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
