"""Tokens a second of a server before anything is loaded, by MoE-Lens (arXiv 2504.09345).

Its link from host to device is here what reads the weights: memory, and the disk for the experts
that memory does not hold. Steps that carry prompts use nearly every expert.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from moekit.core.errors import UserError
from moekit.ops import native
from moekit.ops.native.formats import plain_format
from moekit.runtime.forecast_decode import DecodePlan
from moekit.runtime.moe_lens import BatchForecast, BatchLoad, batch_bound, batch_forecast

# Rows and columns of a product that is bound by computing, and the rows of a step.
MATRIX, ROWS = (2048, 2048), 128
SECONDS = 0.2


@dataclass(frozen=True)
class Requests:
    """`count` requests of `prompt` tokens, each answered with `generated`."""

    prompt: int
    generated: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Requests:
        """From "512+128" or "512+128x100"; UserError for anything else."""
        lengths, _, count = text.partition("x")
        prompt, _, generated = lengths.partition("+")
        numbers = [part.strip() for part in (prompt, generated, count or "100")]
        if not all(number.isdecimal() and int(number) for number in numbers):
            raise UserError(f"--requests {text!r} is not PROMPT+ANSWERxCOUNT, such as 512+128x100")
        return cls(*map(int, numbers))


@dataclass(frozen=True)
class ServerPlan:
    """Forecasts of what `streams` sequences generate together, in tokens a second: all decoding,
    endless requests, and so many of them."""

    streams: int
    decoding: float
    endless: BatchForecast
    some: BatchForecast

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def compute_rate(threads: int, seconds: float = SECONDS) -> float:
    """Multiply-adds a second, counted twice, of a product with a bfloat16 matrix."""
    rows, columns = MATRIX
    matrix = torch.zeros(MATRIX, dtype=torch.bfloat16)
    x = torch.ones(ROWS, columns)
    library = native.library()
    pool = native.Pool(library, threads) if library is not None else None
    described = plain_format(MATRIX, torch.bfloat16)
    best, start = float("inf"), time.perf_counter()
    while best == float("inf") or time.perf_counter() - start < seconds:
        began = time.perf_counter()
        if pool is not None:
            pool.matmul(described, matrix.data_ptr(), x)
        else:
            x.bfloat16() @ matrix.T
        best = min(best, time.perf_counter() - began)
    if pool is not None:
        pool.close()
    return 2 * rows * columns * ROWS / best


def plan_server(plan: DecodePlan, requests: Requests, flops: float) -> ServerPlan:
    """What a server does with `requests`, from the plan of its decoding and `flops` operations a
    second.

    Raises UserError where a request does not fit the context.
    """
    budget, machine = plan.budget, plan.machine
    streams = budget.needs.streams
    missing = budget.all_experts - min(budget.expert_cache, budget.all_experts)
    reading = (plan.load.resident_bytes + budget.all_experts) / machine.memory_bandwidth
    load = BatchLoad(
        prompt=requests.prompt,
        generated=requests.generated,
        kv_tokens=streams * budget.needs.max_context,
        weight_seconds=reading + missing / machine.disk_bandwidth,
        device_tokens=flops / (2 * plan.load.active_params),
    )
    if requests.prompt + requests.generated > budget.needs.max_context:
        raise UserError(
            f"requests of {requests.prompt} + {requests.generated} tokens exceed the context of "
            f"{budget.needs.max_context}"
        )
    return ServerPlan(
        streams,
        plan.together(streams, flops).tokens_per_second,
        batch_bound(load),
        batch_forecast(load, requests.count),
    )
