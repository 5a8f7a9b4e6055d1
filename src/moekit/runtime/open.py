"""`open_engine`: from a path to a model that generates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moekit.core.architecture import read_config
from moekit.core.checkpoint import Checkpoint
from moekit.core.errors import UserError
from moekit.core.load import PACKED_FILE, find_config, find_model, load, resolve_model
from moekit.core.machine import available_memory
from moekit.core.memory import bytes_of, format_bytes
from moekit.core.spec import MoESpec
from moekit.runtime.context import context_length
from moekit.runtime.device.device import open_device
from moekit.runtime.engine import Engine
from moekit.runtime.graph_runner import GraphRunner
from moekit.runtime.pack_cache import packed_copy
from moekit.runtime.schedule.fallback import PlaneFallback
from moekit.runtime.schedule.sharing import shared_experts

if TYPE_CHECKING:
    from moekit.core.cache_score import CacheScore
    from moekit.runtime.predict.predictor import Predictor

AUTO = "auto"
RUNNERS = (AUTO, "graph", "native")
# Sequences at once, where no memory limit says how many.
STREAMS = 32


def open_engine(
    path: str | Path,
    memory: int | str | None = None,
    threads: int | None = None,
    *,
    expert_cache: int | str | None = None,
    policy: str | CacheScore = AUTO,
    predictor: str | Predictor = AUTO,
    prefetch: bool = True,
    trace: str | Path | None = None,
    slots_per_layer: bool = False,
    share_experts: str | None = None,
    low_bit_fallback: float | PlaneFallback | None = None,
    codec: str | None = None,
    resident_codec: str | None = None,
    dtype: str | None = None,
    runner: str = AUTO,
    max_context: int | None = None,
    streams: int | None = None,
    device: str | None = None,
    gpu_memory: int | str | None = None,
    scheduler: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> Engine:
    """Open a packed model, a model directory, a hub id or `babel` for generation.

    `memory` is the limit of the process in bytes or as text ("6GiB"); "auto" takes most of what
    this machine has left. `expert_cache` bounds the part of it that experts take. A model that is
    not packed is packed on the fly, into a cache directory, where one of them or a `codec` is given
    ("auto": the widest that fits); without them it is loaded whole. `threads` are CPU threads
    (default: torch's own choice).

    `policy` decides which experts stay in memory and `predictor` which are read ahead, unless
    `prefetch` is off; neither changes a result. Both are named as in the registry, with options as
    "mrs:near=3"; a predictor may also be the directory of a saved one. Those that learn do so from
    the `trace` (`moekit trace`). Layers share the slots of the cache unless `slots_per_layer`. With
    memory "auto", where not all experts fit, the policy is chosen by replaying a short trace.

    Two ways to read fewer experts are lossy, off unless asked for, and need the native runner:
    `share_experts` ("des-vote", "des-seq:per_token=2") lets sequences that decode together choose
    from one small set; with `low_bit_fallback` missing experts of at most this router weight run
    from the first bit plane of a nested codec.

    `resident_codec` encodes what is not an expert too, which is lossy. `dtype` is the number format
    of the weights that are not encoded (default: as stored). `runner` is "native" (the common
    shapes), "graph" (any decoder-only family) or "auto".
    `streams` sequences of up to `max_context` tokens are planned for.

    With `device` "cuda" (or "cuda:1") the model runs on a GPU, in `gpu_memory` bytes of it (default
    and "auto": most of what is free): what is not an expert, and as many experts as fit; the others
    are in pinned RAM within `memory`, or on disk. `scheduler` says who computes an expert that the
    GPU lacks: "on-demand" (the GPU, which changes no result), "hybrimoe", "fiddler" or
    "static-split" (also the processor).

    `progress` gets (bytes packed, all bytes), `note` lines for the user. Raises UserError as `load`
    and `pack` do, for more context than the model was made for, and with all numbers where the
    model does not fit; StoreError for a damaged packed model.
    """
    if runner not in RUNNERS:
        raise UserError(f"runner {runner!r} is none of {', '.join(RUNNERS)}")
    if device in (None, "cpu"):
        device = None
        if gpu_memory is not None or scheduler is not None:
            name = "scheduler" if gpu_memory is None else "gpu_memory"
            raise UserError(f"{name} needs a GPU: give device='cuda' too")
    else:
        if share_experts is not None or low_bit_fallback is not None:
            raise UserError("share_experts and low_bit_fallback need the processor: no device")
        # Before a model is packed for nothing.
        open_device(device)
    limit = None if memory in (None, AUTO) else bytes_of(memory or 0)
    if threads is not None:
        torch.set_num_threads(threads)
    source = find_config(path)
    # Before anything is packed or read.
    context_length(read_config(source), max_context)
    packed = (Path(source) / PACKED_FILE).is_file()
    whole = memory is None and codec is None and expert_cache is None and device is None
    if not packed and whole:
        if share_experts is not None or low_bit_fallback is not None:
            raise UserError("share_experts and low_bit_fallback need a packed model: give a codec")
        return _open_whole(path, dtype, runner, max_context, streams)
    from moekit.runtime.open_packed import Request, open_packed

    directory = Path(source)
    notes: list[str] = []
    if not packed:
        directory, notes = _packed(find_model(path), codec, resident_codec, limit, progress, note)
    elif codec not in (None, AUTO):
        raise UserError(f"{path} is packed already: leave out codec, or give the unpacked model")
    request = Request(
        limit=limit,
        expert_cache=None if expert_cache is None else bytes_of(expert_cache),
        threads=torch.get_num_threads(),
        policy=policy,
        predictor=predictor,
        prefetch=prefetch,
        resident_codec=resident_codec,
        dtype=dtype,
        runner=runner,
        max_context=max_context,
        streams=streams,
        slots_per_layer=slots_per_layer,
        trace=trace,
        sharing=None if share_experts is None else shared_experts(share_experts),
        fallback=_fallback(low_bit_fallback),
        chooses_policy=memory == AUTO and policy == AUTO and device is None,
        device=device,
        gpu_memory=None if gpu_memory in (None, AUTO) else bytes_of(gpu_memory or 0),
        scheduler=scheduler or "on-demand",
    )
    return open_packed(directory, request, notes)


def _fallback(given: float | PlaneFallback | None) -> PlaneFallback | None:
    if given is None or isinstance(given, PlaneFallback):
        return given
    return PlaneFallback(max_weight=given)


def _open_whole(
    path: str | Path,
    dtype: str | None,
    runner: str,
    max_context: int | None,
    streams: int | None,
) -> Engine:
    if runner == "native":
        raise UserError("the native runner needs a packed model: give a codec, such as bf16")
    if not isinstance(resolve_model(path), str):
        _check_fits(find_model(path))
    loaded = load(path, dtype)
    config: Any = loaded.model.config
    return Engine(
        GraphRunner(loaded.model),
        spec=loaded.spec,
        config=config,
        generation_config=loaded.model.generation_config,
        tokenizer=loaded.tokenizer,
        max_context=context_length(config, max_context, default=None),
        streams=streams or STREAMS,
    )


def _check_fits(directory: Path) -> None:
    with Checkpoint(directory) as checkpoint:
        needed, left = checkpoint.nbytes, available_memory()
    if needed > left:
        raise UserError(
            f"{directory} has {format_bytes(needed)} of weights and {format_bytes(left)} of memory "
            "are left; memory='auto' runs it with the experts on disk"
        )


def _packed(
    directory: Path,
    codec: str | None,
    resident_codec: str | None,
    limit: int | None,
    progress: Callable[[int, int], None] | None,
    note: Callable[[str], None] | None,
) -> tuple[Path, list[str]]:
    from moekit.runtime.choose import choose_codec

    notes = []
    group_size = 32
    if codec in (None, AUTO):
        spec = MoESpec.from_config(read_config(directory))
        choice = choose_codec(spec, limit if limit is not None else available_memory())
        codec, group_size = choice.codec, choice.group_size
        notes.append(choice.reason)
    assert codec is not None
    made = packed_copy(
        directory, codec, group_size, resident_codec=resident_codec, progress=progress, note=note
    )
    return made, notes
