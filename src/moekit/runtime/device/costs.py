"""What experts cost on a device, on the processor and on the way between, measured when opened."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from moekit.ops.triton.experts import GroupedExperts
from moekit.runtime.cache_stats import CacheStats
from moekit.runtime.device.cache import DeviceCache
from moekit.runtime.schedule.split import SplitCosts

REPEATS = 5


@torch.inference_mode()
def measure_costs(
    cache: DeviceCache, on_device: GroupedExperts, on_host: Any, dtype: torch.dtype
) -> SplitCosts:
    """Costs of the first expert of the first layer and one token in a model of `dtype`; the cache
    must be empty.

    `on_device` and `on_host` compute the layer. The first call of each is not counted: it compiles.
    """
    device, width = cache.device, on_device.formats[0].up.cols
    inputs = [torch.ones(1, width, dtype=dtype), torch.zeros(1, 1, dtype=torch.int64)]
    inputs.append(torch.ones(1, 1, dtype=dtype))
    there = [tensor.to(device.torch_device) for tensor in inputs]

    def compute() -> None:
        _run(on_device, there, {0: 0})
        device.mark().wait()

    with _first_record(cache) as record:
        target = cache.memory[: len(record)]
        return SplitCosts(
            transfer=_seconds(lambda: device.copy(target, record, None).wait()),
            gpu_expert=_seconds(compute),
            cpu_token=_seconds(lambda: _run(on_host, inputs, {0: record})),
        )


def link_speed(cache: DeviceCache) -> float:
    """Bytes a second from RAM to the device, by copies of one expert; the cache must be empty."""
    with _first_record(cache) as record:
        target = cache.memory[: len(record)]
        return len(record) / _seconds(lambda: cache.device.copy(target, record, None).wait())


@contextmanager
def _first_record(cache: DeviceCache) -> Iterator[Tensor]:
    """The first expert of the first layer in RAM; what that counts is forgotten."""
    with cache.below.begin(0, [0]) as claim:
        for _ in claim.arrivals():
            pass
        yield cache.below.record(0, 0)
    cache.below.stats = CacheStats(peak_bytes=cache.below.stats.peak_bytes)


def _run(experts: Any, inputs: list[Tensor], records: dict[int, Any]) -> None:
    call = experts.start(*inputs)
    call.run(records)
    call.result()


def _seconds(what: Callable[[], object]) -> float:
    what()
    began = time.perf_counter()
    for _ in range(REPEATS):
        what()
    return (time.perf_counter() - began) / REPEATS
