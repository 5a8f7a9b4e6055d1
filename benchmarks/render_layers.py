"""The section of docs/results.md about computing a layer's experts in training, for `render.py`."""

from typing import Any

from tables import machine, table


def layer_compute(record: dict[str, Any]) -> str:
    rows = []
    for name, row in record["metrics"]["rows"].items():
        dtype, how, who = name.split(", ")
        ratio = f"{row['of_best_peer']:.2f}"
        ratio += f" ({row['of_best_peer_low']:.2f} to {row['of_best_peer_high']:.2f})"
        rows.append(
            [
                f"{dtype}, {how}",
                who,
                f"{row['forward_ms']:.1f}",
                f"{row['backward_ms']:.1f}",
                f"{row['both_ms']:.1f}",
                ratio,
                f"{row['kept_bytes'] / 1e6:.1f}",
            ]
        )
    options = record["options"]
    header = ["dtype, routing", "experts", "forward ms", "backward ms", "both ms"]
    return "\n\n".join(
        [
            "## Experts in training",
            "`benchmarks/layer_compute.py`. Forward and backward of 32 SwiGLU experts of width "
            "256 on 2048 tokens of width 512, four experts a token, beside transformers' two best "
            "implementations; outputs and gradients checked against float64 first. Medians of "
            f"{options['rounds']} rounds on {options['threads']} threads, in each of which all run "
            "one after the other; the ratio is taken round by round to the faster of transformers' "
            "two, with its 10th and 90th percentile. With new routing every round the experts' "
            "numbers of rows change, as they do in training. Kept: what the graph holds for the "
            "backward pass, the layer's input among it and the weights not. " + machine(record),
            table([*header, "of transformers' best", "kept MB"], rows),
        ]
    )
