"""What the default statistics cost beside plain forward passes over the same batches.

    OMP_NUM_THREADS=1 python benchmarks/profile_cost.py

takes the processor seconds of plain passes with transformers' own experts and of the default set of
`moekit profile`, in turns, on random models of two shapes, and writes the medians of their ratio to
`benchmarks/results/profile_cost.json`. It stops where the counts are not those of a trace. The
target is a ratio of at most 1.3. Processor seconds of one thread mean the same on a busy machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from moekit.core.collect import Batch, collect
from moekit.core.record import start_record
from moekit.core.trace_writer import TraceWriter
from moekit.core.view import MoEView
from moekit.profile import profile

RESULT = Path(__file__).parent / "results" / "profile_cost.json"
# (D, layers, E, K, F): babel's own shape, and a wider one with the proportions of larger models.
SHAPES = {"babel": (256, 6, 32, 4, 128), "wide": (1024, 2, 64, 8, 768)}
TARGET = 1.3


def build(shape: tuple[int, ...], dtype: torch.dtype) -> Qwen3MoeForCausalLM:
    width, layers, experts, top_k, inner = shape
    config = Qwen3MoeConfig(
        vocab_size=8192,
        hidden_size=width,
        intermediate_size=2 * width,
        moe_intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 128),
        head_dim=64,
        num_experts=experts,
        num_experts_per_tok=top_k,
        initializer_range=0.05,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    return Qwen3MoeForCausalLM._from_config(config, dtype=dtype).eval()


def measure(view: MoEView, batches: list[Batch], repeats: int) -> dict[str, Any]:
    writer = TraceWriter()
    stats = profile(view, batches, sinks=[writer])
    for layer in view:
        ids = writer.trace.layer(layer.position).topk_ids.flatten()
        counts = torch.bincount(ids, minlength=layer.num_experts)
        assert torch.equal(counts, stats.counts(layer.position))
    plain, profiled = [], []
    for _ in range(repeats):
        start = time.process_time()
        collect(view, batches, [])
        middle = time.process_time()
        profile(view, batches)
        profiled.append(time.process_time() - middle)
        plain.append(middle - start)
    ratios = [b / a for a, b in zip(plain, profiled, strict=True)]
    return {
        "plain_seconds": statistics.median(plain),
        "profile_seconds": statistics.median(profiled),
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    arguments = parser.parse_args()
    record = start_record("benchmark profile_cost", vars(arguments), seed=0)
    torch.manual_seed(0)
    rows = {}
    for name, shape in SHAPES.items():
        view = MoEView(build(shape, getattr(torch, arguments.dtype)))
        batches = [Batch(torch.randint(0, 8192, (8, 512))) for _ in range(arguments.batches)]
        # The name of the experts function is the family's default; the loop is the other one.
        for experts in ("grouped_mm", "eager"):
            view.model.set_experts_implementation(experts)
            row = measure(view, batches, arguments.repeats)
            rows[f"{name}, {experts}"] = row
            print(f"{name:6} beside {experts:10} {row['ratio']:.2f}x {row['ratio_range']}")
    record.finish({"load_average": os.getloadavg()[0], "target": TARGET, "rows": rows})
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(json.loads(record.to_json()), indent=2) + "\n")


if __name__ == "__main__":
    main()
