"""Write docs/results.md from the JSON files in benchmarks/results; `--check` only compares.

python benchmarks/render.py
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from render_apply import compress_apply, compress_gguf
from render_cache import cache_policies
from render_condense import compress_condense
from render_engine import opening, pack_memory, run_forecast, run_memory, run_uniform_routing
from render_kernels import native_kernels
from render_layers import layer_compute
from render_merge import merge_babel, merge_speed, merge_twins
from render_peers import compress_auto, compress_peers
from render_predictors import predictors
from render_prune import compress_prune, dynamic_pruning
from render_quantize import compress_quantize
from render_routers import router_table
from render_runtime import gguf_llama_cpp, run_in_memory, run_larger_than_memory, serve_streams
from render_upcycle import upcycle_peers, upcycle_table
from tables import machine, table

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "results.md"
INTRO = """# Results

Every number on this page comes from a JSON file in `benchmarks/results`, written by the script
named above its table; `python benchmarks/render.py` makes the page. Models are trained or random
as said; text is real. Bits per byte count every byte of the text, the first of a document
included.
"""


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
        "rules fixed beforehand, but for two that say so (`benchmarks/babel_claims.py`). Text: up "
        f"to {options['documents']} documents of a domain of `valid`, {options['length']} tokens "
        f"of each; {options['sentences']} parallel "
        "sentences a language. " + machine(record),
        _claims(found["claims"]),
        "The rules: "
        + " ".join(f"({n}) {row['rule']}." for n, row in enumerate(found["claims"].values(), 1)),
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


def _claims(claims: dict[str, dict[str, Any]]) -> str:
    """A row for every claim, with the numbers that decide it."""
    rows = [
        [
            f"({n}) {row['claim']} ({row['paper']})",
            f"**{row['verdict']}**",
            CLAIM_NUMBERS[name](row["numbers"]),
        ]
        for n, (name, row) in enumerate(claims.items(), 1)
    ]
    return table(["claim", "verdict", "what decides it"], rows)


def _list(values: list[float]) -> str:
    return " ".join(f"{value:.2f}" for value in values)


def _interval(values: list[float]) -> str:
    mean, low, high = values
    return f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"


def _phases(numbers: dict[str, Any]) -> str:
    held = "router logits" if numbers["logits"] else "gate weights and no router logits"
    return (
        f"{numbers['probes']} probes over {numbers['steps']} steps, with {held}; gamma by probe "
        + " ".join(f"{row['gamma']:.0f}" for row in numbers["course"])
        + f", noise {numbers['noise']:.0f}; busiest expert over even share "
        + _list([row["imbalance"] for row in numbers["course"]])
    )


CLAIM_NUMBERS: dict[str, Callable[[dict[str, Any]], str]] = {
    "language-u": lambda n: (
        f"divergence by layer {_list(n['by_layer_trained'])}; first third minus middle "
        f"{_interval(n['early_minus_middle'])}, last {_interval(n['late_minus_middle'])}. All 17 "
        f"languages: {_list(n['by_layer_all'])}"
    ),
    "language-loss": lambda n: (
        f"rank correlation {n['correlation']:.2f} over {n['languages']} languages, p {n['p']:.3f}"
    ),
    "token-identity": lambda n: (
        f"equal token {n['token']:.2f}, with equal token before {n['pair']:.2f}, equal position "
        f"{n['position']:.3f}, shuffled {n['shuffled']:.3f}; by layer {_list(n['by_layer'])}"
    ),
    "cache-knee": lambda n: (
        f"knee at {n['knees']['m=16']:g} times the active experts (LRU {n['knees']['lru']:g}, "
        f"Belady {n['knees']['belady']:g}); hits at twice {n['at_twice']['sch']:.2f} (LRU "
        f"{n['at_twice']['lru']:.2f}, Belady {n['at_twice']['belady']:.2f}, uniform routing "
        f"{n['at_twice']['uniform']:.2f})"
    ),
    "next-layer": lambda n: (
        f"recall {n['recall']:.2f}, with 4 more {n['recall_with_4_more']:.2f}; most used experts "
        f"{n['popular']:.2f}, table of transitions {n['table_of_transitions']:.2f}"
    ),
    "next-layer-first": lambda n: f"recall by pair of layers {_list(n['by_layer'])}",
    "next-layer-depth": lambda n: (
        f"rank correlation {n['rank_correlation']:.2f} over {n['pairs']} pairs, p {n['p']:.2f}"
    ),
    "three-phases": _phases,
    "super-experts": lambda n: (
        f"largest output {n['largest_over_median']:.1f} times the median expert's, largest token "
        f"{n['largest_token_over_median']:.1f} times the median token; attention to the first "
        f"token {n['sink']:.3f} (equal attention {n['sink_uniform']:.3f})"
    ),
}


def profile_cost(record: dict[str, Any]) -> str:
    rows = [
        [
            name,
            f"{row['plain_seconds']:.2f}",
            f"{row['profile_seconds']:.2f}",
            f"**{row['ratio']:.2f}**",
            f"{row['ratio_range'][0]:.2f} to {row['ratio_range'][1]:.2f}",
        ]
        for name, row in record["metrics"]["rows"].items()
    ]
    options = record["options"]
    return "\n\n".join(
        [
            "## What profiling costs",
            "`benchmarks/profile_cost.py`. The default statistics beside plain forward passes over "
            "the same batches with transformers' own experts, on random models of babel's shape "
            "and of a wider one (width 1024, 2 layers of 64 experts of 768, top 8); "
            f"{options['dtype']}, processor seconds, medians of {options['repeats']}. The target "
            f"is {record['metrics']['target']}. Below 1: the profile runs its experts one by one, "
            "which was faster here than grouped_mm. " + machine(record),
            table(["model, experts beside", "plain s", "profile s", "ratio", "range"], rows),
        ]
    )


def profile_memory(record: dict[str, Any]) -> str:
    limit = record["options"]["limit"]
    rows = [
        [
            name,
            f"{row['checkpoint_bytes'] / 1e6:,.0f}",
            f"{limit / 1e6:.0f}",
            f"**{row['peak_bytes'] / 1e6:.0f}**",
            f"{row['seconds']:.0f}",
        ]
        for name, row in record["metrics"]["rows"].items()
    ]
    tokens = {row["tokens"] for row in record["metrics"]["rows"].values()}
    return "\n\n".join(
        [
            "## Profiling a model larger than memory",
            "`benchmarks/profile_memory.py`. `moekit profile --stream --memory` over "
            f"{max(tokens):,} tokens on random bf16 checkpoints eight times the limit, in 48 "
            "layers and in two layers so large that single experts are read. Peak: anonymous "
            "memory (RssAnon) of the whole process, torch included, sampled from outside every 10 "
            "ms. The limit is the process's own; nothing else held it. " + machine(record),
            table(["checkpoint", "MB", "limit MB", "peak MB", "seconds"], rows),
        ]
    )


def analyze_trace(record: dict[str, Any]) -> str:
    found = record["metrics"]
    rows = [
        [
            row["measure"],
            f"{row['tokens']:,}",
            f"{row['seconds']:.1f}",
            f"{row['peak_bytes'] / 1e6:.0f}",
        ]
        for row in found["measures"]
    ]
    total = found["total"]
    rows.append(
        ["**all**", "", f"**{total['seconds']:.1f}**", f"**{total['peak_bytes'] / 1e6:.0f}**"]
    )
    return "\n\n".join(
        [
            "## Analysing a large trace",
            "`benchmarks/analyze_trace.py`. Every measure that needs only a trace, on one of "
            f"{record['options']['tokens']:,} tokens by 24 layers by top 8 of 64 "
            f"({total['trace_bytes'] / 1e6:.0f} MB on disk), synthetic with a stated skew; one "
            "thread. Some measures read a stated part of the tokens. MB is the peak of anonymous "
            "memory of the process so far, torch included. " + machine(record),
            table(["measure", "tokens read", "seconds", "MB"], rows),
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
    "babel_analysis": babel_analysis,
    "profile_cost": profile_cost,
    "profile_memory": profile_memory,
    "analyze_trace": analyze_trace,
    "convert_memory": convert_memory,
    "cache_policies": cache_policies,
    "predictors": predictors,
    "gguf_llama_cpp": gguf_llama_cpp,
    "native_kernels": native_kernels,
    "layer_compute": layer_compute,
    "run_in_memory_r1": run_in_memory,
    "run_in_memory_r2": run_in_memory,
    "run_larger_than_memory": run_larger_than_memory,
    "run_uniform_routing": run_uniform_routing,
    "opening": opening,
    "run_memory": run_memory,
    "pack_memory": pack_memory,
    "run_forecast": run_forecast,
    "serve_streams": serve_streams,
    "compress_apply": compress_apply,
    "compress_apply_small": compress_apply,
    "compress_gguf": compress_gguf,
    "compress_prune": compress_prune,
    "compress_condense": compress_condense,
    "dynamic_pruning": dynamic_pruning,
    "compress_quantize": compress_quantize,
    "merge_speed": merge_speed,
    "merge_speed_large": merge_speed,
    "merge_babel": merge_babel,
    "merge_twins": merge_twins,
    "compress_auto": compress_auto,
    "compress_peers": compress_peers,
    "router_table": router_table,
    "upcycle_table": upcycle_table,
    "upcycle_peers": upcycle_peers,
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
