"""Write docs/results.md from the JSON files in benchmarks/results; `--check` only compares.

python benchmarks/render.py
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "results.md"
INTRO = """# Results

Every number on this page comes from a JSON file in `benchmarks/results`, written by the script
named above its table; `python benchmarks/render.py` makes the page. Models are trained or random
as said; text is real. Bits per byte count every byte of the text, the first of a document
included.
"""


def table(header: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table; the first column to the left, the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def machine(record: dict[str, Any]) -> str:
    hardware, versions = record["hardware"], record["versions"]
    return (
        f"{hardware['cpu']}, {hardware['cores']} cores; torch {versions['torch']}, transformers "
        f"{versions['transformers']}; {record['started'][:10]}."
    )


def babel_quality(record: dict[str, Any]) -> str:
    found = record["metrics"]
    names = sorted(found["babel"]["by_domain"])
    columns = ["babel", "dense", "xz"]
    rows = [
        [name, *(f"{found[column]['by_domain'][name]:.3f}" for column in columns)] for name in names
    ]
    rows.append(["**mean**", *(f"**{found[column]['mean']:.3f}**" for column in columns)])
    routing = found["routing"]
    layers = [
        [
            position,
            f"{layer['bits']:.4f}",
            f"{layer['chance']:.4f}",
            f"{layer['p']:.3f}",
            layer["specialists"],
            dead,
        ]
        for position, (layer, dead) in enumerate(
            zip(routing["layers"], routing["dead_experts"], strict=True)
        )
    ]
    return "\n\n".join(
        [
            "## babel",
            f"`benchmarks/babel_quality.py`. babel has {found['babel']['parameters']:,} "
            f"parameters, its dense twin {found['dense']['parameters']:,}: the same active "
            "parameters, tokens, order and schedule (`recipes/babel.yaml`, "
            "`recipes/babel-dense.yaml`). Bits per byte on `valid`, windows of 512 tokens with a "
            "stride of 256. xz: what `xz -9` adds for the validation text after the training text. "
            + machine(record),
            table(["domain", "babel", "dense twin", "xz -9"], rows),
            "Does the routing depend on the domain? Mutual information of domain and expert over "
            f"{routing['tokens']:,} tokens of `valid` in {routing['sequences']} sequences, bits; "
            f"its mean and p under {routing['permutations']} exchanges of domains between "
            "sequences; pairs of expert and domain above chance; experts that no token reached.",
            table(["layer", "bits", "chance", "p", "specialists", "unused experts"], layers),
        ]
    )


def convert_memory(record: dict[str, Any]) -> str:
    found = record["metrics"]
    rows = [
        [name, f"{run['above_import'] / 1e6:.0f}", f"{run['seconds']:.0f}"]
        for name, run in found["runs"].items()
    ]
    equal = "all equal" if found["all_equal"] else "NOT all equal"
    return "\n\n".join(
        [
            "## Converting in constant memory",
            "`benchmarks/convert_memory.py`. A checkpoint of "
            f"{found['checkpoint_bytes'] / 1e9:.1f} "
            "GB of random bf16 weights is copied and converted; "
            f"{found['tensors_compared']:,} tensors compared, {equal}. Peak of anonymous memory "
            "(RssAnon) above that after import. The machine was busy (load "
            f"{found['load_average_at_end']:.0f} at the end), so the seconds say little. "
            + machine(record),
            table(["run", "peak MB above import", "seconds"], rows),
        ]
    )


SECTIONS: dict[str, Callable[[dict[str, Any]], str]] = {
    "babel_quality": babel_quality,
    "convert_memory": convert_memory,
}


def render() -> str:
    """The page, from the result files there are."""
    parts = [INTRO]
    for name, section in SECTIONS.items():
        path = HERE / "results" / f"{name}.json"
        if path.is_file():
            parts.append(section(json.loads(path.read_text())))
    return "\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Write docs/results.md from benchmarks/results.")
    parser.add_argument("--check", action="store_true", help="fail when the page is stale")
    page = render()
    if parser.parse_args().check:
        sys.exit(0 if PAGE.read_text() == page else "docs/results.md is stale: run render.py")
    PAGE.write_text(page)


if __name__ == "__main__":
    main()
