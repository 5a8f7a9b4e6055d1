"""How fast a layer's experts train on this CPU, and what they keep in memory for the backward pass.

    python benchmarks/layer_compute.py

Forward and backward of 32 SwiGLU experts of width 256 on 2048 tokens of width 512, four experts a
token, beside transformers' own implementations; every round runs all of them, one after the other.
Routing is drawn once, or anew every round as in training, when most numbers of rows are new ones.
Outputs and gradients that differ from float64 stop the run before anything is timed.
Writes `benchmarks/results/layer_compute.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from moekit.core.record import start_record
from moekit.ops.grouped import grouped_experts

RESULT = Path(__file__).parent / "results" / "layer_compute.json"
TOKENS, WIDTH, INNER, EXPERTS, TOP_K = 2048, 512, 256, 32, 4
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Three roundings to 8 bits on the way; sums of a few hundred products in another order.
TOLERANCE = {"bf16": 0.02, "fp32": 1e-5}
PEERS = ("grouped_mm", "eager")
Run = Callable[[Tensor, Tensor, Tensor], Tensor]


class Case:
    """Banks and inputs of one dtype, and the implementations that run on them."""

    def __init__(self, dtype: torch.dtype) -> None:
        draw = torch.Generator().manual_seed(0)
        self.hidden = torch.randn(TOKENS, WIDTH, generator=draw).to(dtype)
        self.gate_up = nn.Parameter(
            (0.04 * torch.randn(EXPERTS, 2 * INNER, WIDTH, generator=draw)).to(dtype)
        )
        self.down = nn.Parameter(
            (0.04 * torch.randn(EXPERTS, WIDTH, INNER, generator=draw)).to(dtype)
        )
        self.grad = torch.randn(TOKENS, WIDTH, generator=draw).to(dtype)
        self.runs: dict[str, Run] = {"moekit": self._own}
        self.runs |= {name: self._stock(name) for name in PEERS}

    def _own(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return grouped_experts(hidden, ids, weights, self.gate_up, self.down)

    def _stock(self, implementation: str) -> Run:
        config = Qwen3MoeConfig(
            hidden_size=WIDTH,
            moe_intermediate_size=INNER,
            num_experts=EXPERTS,
            num_experts_per_tok=TOP_K,
        )
        config._experts_implementation = implementation
        experts = Qwen3MoeExperts(config)
        experts.gate_up_proj, experts.down_proj = self.gate_up, self.down
        return experts.__call__

    def step(self, run: Run, ids: Tensor, weights: Tensor) -> tuple[list[Tensor], float, float]:
        """Output and gradients, and the seconds of forward and backward."""
        hidden = self.hidden.detach().requires_grad_()
        weights = weights.to(hidden.dtype).detach().requires_grad_()
        self.gate_up.grad = self.down.grad = None
        begin = time.perf_counter()
        out = run(hidden, ids, weights)
        middle = time.perf_counter()
        out.backward(self.grad)
        end = time.perf_counter()
        grads = [hidden.grad, weights.grad, self.gate_up.grad, self.down.grad]
        made = [out.detach(), *(grad for grad in grads if grad is not None)]
        return made, middle - begin, end - middle

    def kept(self, run: Run, ids: Tensor, weights: Tensor) -> int:
        """Bytes that the graph keeps for the backward pass, the layer's input among them."""
        source = self.hidden.detach().requires_grad_()
        weights = weights.to(source.dtype).detach().requires_grad_()
        own = {x.untyped_storage().data_ptr() for x in (source, weights, self.gate_up, self.down)}
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                sizes[storage.data_ptr()] = storage.nbytes()
                held.append(tensor)
            return tensor

        held: list[Tensor] = []  # so that no storage is freed and its address used again
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            # A copy, so that the input is the work of some layer before and counts.
            run(source * 1, ids, weights)
        return sum(sizes.values())


def routing(seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    weights, ids = torch.rand(TOKENS, EXPERTS, generator=draw).topk(TOP_K)
    return ids, weights.softmax(-1)


def check(name: str, case: Case) -> None:
    """Stop unless every implementation gives the float64 outputs and gradients of the eager one."""
    exact = Case(torch.float64)
    for mine, theirs in (("hidden", "hidden"), ("grad", "grad")):
        setattr(exact, mine, getattr(case, theirs).double())
    exact.gate_up.data, exact.down.data = case.gate_up.double(), case.down.double()
    ids, weights = routing(0)
    weights = weights.to(case.hidden.dtype)
    expected = exact.step(exact.runs["eager"], ids, weights)[0]
    for title, run in case.runs.items():
        for found, value in zip(case.step(run, ids, weights)[0], expected, strict=True):
            error = float((found.double() - value).norm() / value.norm())
            if not error <= TOLERANCE[name]:
                raise SystemExit(f"{title} in {name} is off by {error:.1e}; nothing was timed")


def measure(case: Case, rounds: int, fresh: bool) -> dict[str, dict[str, float]]:
    """Medians in milliseconds; rounds in pairs, so that a busy moment strikes all alike."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in case.runs}
    for number in range(rounds + 1):
        ids, weights = routing(number if fresh else 0)
        for name, run in case.runs.items():
            _, forward, backward = case.step(run, ids, weights)
            if number:
                taken[name].append((forward, backward))
    best = [min(sum(taken[name][i]) for name in PEERS) for i in range(rounds)]
    rows = {}
    for name, times in taken.items():
        ratios = sorted(sum(pair) / peer for pair, peer in zip(times, best, strict=True))
        rows[name] = {
            "forward_ms": statistics.median(f for f, _ in times) * 1e3,
            "backward_ms": statistics.median(b for _, b in times) * 1e3,
            "both_ms": statistics.median(f + b for f, b in times) * 1e3,
            "of_best_peer": statistics.median(ratios),
            "of_best_peer_low": ratios[len(ratios) // 10],
            "of_best_peer_high": ratios[-1 - len(ratios) // 10],
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=11)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    record = start_record("benchmark layer_compute", vars(arguments), seed=0)
    rows: dict[str, Any] = {}
    for name, dtype in DTYPES.items():
        case = Case(dtype)
        check(name, case)
        kept = {title: case.kept(run, *routing(0)) for title, run in case.runs.items()}
        for fresh in (False, True):
            title = f"{name}, {'new routing every round' if fresh else 'one routing'}"
            found = measure(case, arguments.rounds, fresh)
            for row, values in found.items():
                rows[f"{title}, {row}"] = {**values, "kept_bytes": kept[row]}
                print(f"{title:32} {row:11} {values['both_ms']:7.1f} ms, {kept[row]:,} bytes")
    record.finish({"load_average": os.getloadavg()[0], "rows": rows})
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(json.loads(record.to_json()), indent=2) + "\n")


if __name__ == "__main__":
    main()
