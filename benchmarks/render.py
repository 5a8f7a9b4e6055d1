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
            "`recipes/babel-dense.yaml`). Bits per byte on `valid` as `moekit train` measured them "
            "when the runs ended (fp32 weights under bf16 autocast), windows of 512 tokens with a "
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


def babel_analysis(record: dict[str, Any]) -> str:
    found, options = record["metrics"], record["options"]
    parts = [
        "## What babel's routing shows",
        "`benchmarks/babel_analysis.py`. Claims of papers about large models, checked on babel by "
        f"rules that the script states. Text: up to {options['documents']} documents of a domain "
        f"of `valid`, {options['length']} tokens of each; {options['sentences']} parallel "
        "sentences a language. " + machine(record),
        table(
            ["claim", "verdict", "numbers"],
            [
                [f"{row['claim']} ({row['paper']})", f"**{row['verdict']}**", _numbers(row)]
                for row in found["claims"]
            ],
        ),
        "Rules: " + " ".join(f"({n}) {row['rule']}." for n, row in enumerate(found["claims"], 1)),
        "Which experts serve whom: mutual information with the expert in bits (under exchange of "
        "labels between documents: mean), layers with p <= 0.05, and pairs beyond 95 % of the "
        "largest nPMI under exchange.",
    ]
    rows = []
    for name, serving in found["serving"].items():
        layers = serving["layers"]
        rows.append(
            [
                name,
                serving["documents"],
                " ".join(f"{layer['bits']:.2f} ({layer['chance']:.2f})" for layer in layers),
                f"{sum(layer['p'] <= 0.05 for layer in layers)} of {len(layers)}",
                sum(serving["specialists"]),
            ]
        )
    parts.append(
        table(["labels", "documents", "bits (chance) by layer", "significant", "pairs"], rows)
    )
    parts.append("The strongest significant expert of every domain and language:")
    parts.append(
        table(
            ["served", "layer", "expert", "nPMI"],
            [
                [name, best["layer"], best["expert"], f"{best['npmi']:.2f}"]
                for labels in ("domain", "language")
                for name, best in sorted(found["serving"][labels]["strongest"].items())
            ],
        )
    )
    ablated = found["ablations"]
    parts.append(
        f"Loss (nats a token, {ablated['loss']:.3f} without) when a layer's routing is exchanged "
        f"at random, over {ablated['tokens']:,} tokens, 95 % interval with documents as what "
        f"varies. Of the {ablated['experts_ablated']} most used experts "
        f"{ablated['experts_that_matter']} raise the loss when banned, with an interval above 0."
    )
    coupling = {row["layer"]: row for row in found["coupling"]["layers"]}
    twins = {row["layer"]: row for row in found["redundancy"]["layers"]}
    rows = [
        [
            row["layer"],
            f"{row['loss change']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f})",
            f"{coupling[row['layer']]['own rows']:.2f} (p {coupling[row['layer']]['p']:.3f})",
            f"{twins[row['layer']]['weights max']:.2f}",
            f"{twins[row['layer']]['outputs max']:.2f}",
            f"{twins[row['layer']]['cka']:.2f}",
        ]
        for row in sorted(ablated["layers"], key=lambda row: row["layer"])
    ]
    header = ["layer", "loss change", "router rows that excite their own expert most"]
    header += ["most alike weights", "most alike outputs", "mean CKA"]
    parts.append(table(header, rows))
    return "\n\n".join(parts)


def _numbers(claim: dict[str, Any]) -> str:
    """The few numbers of a claim that decide it."""
    numbers, shown = claim["numbers"], []
    for name, value in numbers.items():
        if isinstance(value, float | int):
            text = str(value) if isinstance(value, int) else f"{value:.3f}"
            shown.append(f"{name.replace('_', ' ')} {text}")
        elif isinstance(value, list) and value and isinstance(value[0], float):
            shown.append(f"{name.replace('_', ' ')} " + " ".join(f"{v:.3f}" for v in value))
    return "; ".join(shown)


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
    "babel_analysis": babel_analysis,
    "convert_memory": convert_memory,
}


def render() -> str:
    """The page, from the result files there are."""
    parts = [INTRO]
    for name, section in SECTIONS.items():
        path = HERE / "results" / f"{name}.json"
        if path.is_file():
            parts.append(section(json.loads(path.read_text())))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Write docs/results.md from benchmarks/results.")
    parser.add_argument("--check", action="store_true", help="fail when the page is stale")
    page = render()
    if parser.parse_args().check:
        sys.exit(0 if PAGE.read_text() == page else "docs/results.md is stale: run render.py")
    PAGE.write_text(page)


if __name__ == "__main__":
    main()
