"""MoE-Lens (arXiv 2504.09345): the throughput of batches whose weights all stream each iteration.

Every iteration moves all weights over a link to the device, and KV memory bounds how many requests
are under way. Arithmetic in bytes, seconds and tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from moekit.core.errors import UserError


def memory_efficiency(prompt: int, generated: int) -> float:
    """PME: tokens that a slot of KV memory lets through, for requests of these lengths, an
    iteration; the request holds p + j slots in its iteration j = 0..g."""
    return (prompt + generated) / ((generated + 1) * (2 * prompt + generated) / 2)


@dataclass(frozen=True)
class BatchForecast:
    """Tokens a second, of prompts and answers together and of answers alone, the share of the
    device's rate that is used, and whether "memory" or "device" is the limit."""

    tokens_per_second: float
    generated_per_second: float
    utilisation: float
    bound: str


@dataclass(frozen=True, kw_only=True)
class BatchLoad:
    """Requests of `prompt` and `generated` tokens; KV memory for `kv_tokens`; seconds that all
    weights take over the link; tokens a second that the device could do."""

    prompt: int
    generated: int
    kv_tokens: float
    weight_seconds: float
    device_tokens: float


def batch_bound(load: BatchLoad) -> BatchForecast:
    """Stage 1: the highest throughput that memory and device allow, for endless requests."""
    efficiency = memory_efficiency(load.prompt, load.generated)
    by_memory = efficiency * load.kv_tokens / load.weight_seconds
    return _batch(load, min(by_memory, load.device_tokens), by_memory)


def batch_forecast(load: BatchLoad, requests: int, block: int = 16) -> BatchForecast:
    """Stage 2: the throughput of `requests` requests with KV memory in blocks of `block` tokens.

    q requests join each iteration, as many as memory and device carry, and one lasts until weights
    and tokens are through; filling and draining take another g iterations. Raises UserError where
    the memory holds no request.
    """
    held = sum(block * math.ceil((load.prompt + age) / block) for age in range(load.generated + 1))
    joining = load.kv_tokens / held
    by_memory = joining * (load.prompt + load.generated) / load.weight_seconds
    if load.kv_tokens < block * math.ceil((load.prompt + load.generated) / block):
        raise UserError(
            f"KV memory of {load.kv_tokens:.0f} tokens holds no request of "
            f"{load.prompt} + {load.generated}"
        )
    saturated = load.device_tokens * load.weight_seconds
    joining = min(joining, saturated / (load.prompt + load.generated))
    iterations = requests / joining + load.generated
    total = requests * (load.prompt + load.generated) / (iterations * load.weight_seconds)
    return _batch(load, total, by_memory)


def _batch(load: BatchLoad, rate: float, by_memory: float) -> BatchForecast:
    answers = load.generated / (load.prompt + load.generated)
    bound = "memory" if by_memory < load.device_tokens else "device"
    return BatchForecast(rate, rate * answers, rate / load.device_tokens, bound)
