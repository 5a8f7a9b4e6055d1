"""How fast the Triton kernels run one layer of experts on a GPU, beside transformers' grouped_mm.

    python benchmarks/gpu_experts.py            # the reference shapes, every codec
    python benchmarks/gpu_experts.py --tune     # also with other blocks than the default ones

Weights are those of a whole layer, more than a cache holds; routing is uniform. Each codec's result
is compared with decoded weights first, and a wrong one stops the run before anything is timed.
Beside the times stand the bytes of weights that a step must read over its time, and what copying an
expert from pinned RAM takes. Writes `benchmarks/results/gpu_experts.json`; without a GPU it says so
and does nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moekit.core.record import start_record
from moekit.ops.codecs import make_codec
from moekit.ops.codecs.memory import lay_out
from moekit.ops.triton import available

RESULT = Path(__file__).parent / "results" / "gpu_experts.json"
# (D, F, K, E): one layer of R1 and of R2, the shape of Qwen3-30B-A3B.
SHAPES = {"R1": (1024, 512, 8, 64), "R2": (2048, 768, 8, 128)}
CODECS = ("int4", "int4:128", "int8", "int3", "int2", "nested4", "bf16")
TOKENS = (1, 4, 16, 128, 2048)
ROUNDS = 20


class Layer:
    """One layer of experts of one codec in GPU memory; the experts hold the same weights, each in
    memory of its own."""

    def __init__(self, codec: str, shape: tuple[int, int, int, int], device: str) -> None:
        from moekit.ops.triton.formats import ExpertFormat, MatrixFormat, matrix_format

        name, _, group = codec.partition(":")
        made = make_codec(name, int(group or 32))
        width, inner, _, self.num_experts = shape
        self.weights: dict[str, Tensor] = {}
        formats: dict[str, MatrixFormat] = {}
        pieces: list[Tensor] = []
        begin = 0
        for part, size in (
            ("gate", (inner, width)),
            ("up", (inner, width)),
            ("down", (width, inner)),
        ):
            encoded = made.encode(torch.randn(size) / size[1] ** 0.5)
            offsets, memory = lay_out(made, encoded)
            moved = [{n: begin + at for n, at in plane.items()} for plane in offsets]
            found = matrix_format(made, size, moved)
            assert found is not None
            formats[part] = found
            self.weights[part] = made.decode(encoded).to(device)
            pieces.append(memory)
            begin += len(memory)
        self.format = ExpertFormat(formats["gate"], formats["up"], formats["down"], "silu")
        record = torch.cat(pieces)
        self.nbytes = len(record)
        self.memory = record.to(device).repeat(self.num_experts)
        self.offsets = {e: e * self.nbytes for e in range(self.num_experts)}

    def run(
        self, inputs: tuple[Tensor, Tensor, Tensor], blocks: Any = None
    ) -> Callable[[], Tensor]:
        """What computes the layer; the places of experts are uploaded once, as in an engine."""
        from moekit.ops.triton.experts import GroupedExperts

        grouped = GroupedExperts([self.format] * self.num_experts, self.memory, blocks)
        placed = grouped.places(self.offsets)

        def call() -> Tensor:
            hidden, ids, weights = inputs
            started = grouped.start(hidden, ids, weights)
            started.run_placed(placed)
            return started.result()

        return call

    def expected(self, hidden: Tensor, weights: Tensor) -> Tensor:
        """All experts being alike, one expert's output times the sum of the weights."""
        x = hidden.float()
        middle = F.silu(x @ self.weights["gate"].T) * (x @ self.weights["up"].T)
        return (middle @ self.weights["down"].T) * weights.float().sum(-1, keepdim=True)


def drawn(tokens: int, shape: tuple[int, int, int, int], device: str) -> tuple[Tensor, ...]:
    width, _, top_k, num_experts = shape
    scores = torch.rand(tokens, num_experts)
    weights, ids = scores.topk(top_k)
    hidden = torch.randn(tokens, width)
    weights = (weights / weights.sum(-1, keepdim=True)).bfloat16()
    return hidden.to(device, torch.bfloat16), ids.to(device), weights.to(device)


def check(layer: Layer, shape: tuple[int, int, int, int], device: str) -> None:
    """Stop unless results are those of decoded weights, rounded to bfloat16 twice."""
    for tokens in (1, 5, 130):
        hidden, ids, weights = drawn(tokens, shape, device)
        out = layer.run((hidden, ids, weights))().float()
        expected = layer.expected(hidden, weights)
        # One rounding of the middle, one of the result, one of the weights' sum.
        bound = 3 * 2**-8 * expected.abs().amax()
        if not bool(((out - expected).abs() <= bound).all()):
            raise SystemExit(f"{tokens} tokens: wrong results; nothing was timed")


def milliseconds(call: Callable[[], Any]) -> float:
    """The median of the GPU's time for a call, the first ones left out."""
    taken = []
    for number in range(ROUNDS + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        if number >= 3:
            taken.append(begin.elapsed_time(end))
    return statistics.median(taken)


def touched(ids: Tensor) -> int:
    return len(ids.unique())


def transformers_layer(shape: tuple[int, int, int, int]) -> Any:
    """The experts of qwen3_moe in bfloat16, computed by grouped_mm."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    width, inner, top_k, num_experts = shape
    config = Qwen3MoeConfig(
        hidden_size=width,
        moe_intermediate_size=inner,
        num_experts=num_experts,
        num_experts_per_tok=top_k,
    )
    config._experts_implementation = "grouped_mm"
    experts = Qwen3MoeExperts(config)
    for parameter in experts.parameters():
        parameter.data = torch.randn(parameter.shape, dtype=torch.bfloat16) / width**0.5
    return experts


def candidates(few: bool) -> list[Any]:
    """Blocks to try. None of them changes the order of a sum in the kernel it is for."""
    from moekit.ops.triton.launch import Blocks

    if few:
        return [Blocks(r, w, 2) for r, w in itertools.product((8, 16, 32, 64), (2, 4, 8))]
    sizes = itertools.product((32, 64), (4, 8), (2, 3, 4), (16, 32, 64))
    return [Blocks(r, w, s, pairs=p) for r, w, s, p in sizes]


def measure(layer: Layer, shape: tuple[int, int, int, int], tune: bool) -> dict[str, Any]:
    from moekit.ops.triton.launch import FEW_TOKENS

    found: dict[str, Any] = {"expert_bytes": layer.nbytes}
    for tokens in TOKENS:
        inputs = drawn(tokens, shape, "cuda")
        taken = milliseconds(layer.run(inputs))
        read = touched(inputs[1]) * layer.nbytes
        found[f"{tokens} tokens"] = {"ms": taken, "gb_per_s": read / taken * 1e-6}
        if tune:
            tried = {
                str(asdict(blocks)): milliseconds(layer.run(inputs, blocks))
                for blocks in candidates(tokens <= FEW_TOKENS)
            }
            best = min(tried, key=lambda name: tried[name])
            found[f"{tokens} tokens"]["best"] = {"blocks": best, "ms": tried[best]}
    source = torch.empty(layer.nbytes, dtype=torch.uint8).pin_memory()
    target = layer.memory[: layer.nbytes]
    copied = milliseconds(lambda: target.copy_(source, non_blocking=True))
    found["copy"] = {"ms": copied, "gb_per_s": layer.nbytes / copied * 1e-6}
    return found


def measure_transformers(shape: tuple[int, int, int, int]) -> dict[str, Any]:
    experts = transformers_layer(shape).cuda()
    nbytes = sum(p.nbytes for p in experts.parameters()) // shape[3]
    found: dict[str, Any] = {"expert_bytes": nbytes}
    with torch.inference_mode():
        for tokens in TOKENS:
            inputs = drawn(tokens, shape, "cuda")
            taken = milliseconds(lambda given=inputs: experts(*given))
            read = touched(inputs[1]) * nbytes
            found[f"{tokens} tokens"] = {"ms": taken, "gb_per_s": read / taken * 1e-6}
    return found


def show(name: str, row: dict[str, Any]) -> None:
    times = ", ".join(f"{tokens}: {row[f'{tokens} tokens']['ms']:.3f} ms" for tokens in TOKENS)
    print(f"{name:24} {times}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--codecs", nargs="+", default=CODECS)
    parser.add_argument("--tune", action="store_true")
    arguments = parser.parse_args()
    if not (torch.cuda.is_available() and available()):
        print("no GPU, or no Triton: nothing was measured")
        return
    torch.manual_seed(0)
    record = start_record("benchmark gpu_experts", vars(arguments), seed=0)
    rows: dict[str, Any] = {}
    for name, shape in SHAPES.items():
        for codec in arguments.codecs:
            layer = Layer(codec, shape, "cuda")
            check(layer, shape, "cuda")
            rows[f"{name}, {codec}"] = measure(layer, shape, arguments.tune)
            show(f"{name}, {codec}", rows[f"{name}, {codec}"])
            del layer
        rows[f"{name}, transformers bf16"] = measure_transformers(shape)
        show(f"{name}, transformers bf16", rows[f"{name}, transformers bf16"])
    record.finish({"gpu": torch.cuda.get_device_name(), "rows": rows})
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(json.loads(record.to_json()), indent=2) + "\n")


if __name__ == "__main__":
    main()
