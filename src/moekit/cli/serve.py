"""`moekit serve`."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moekit.cli.common import (
    DryRunOption,
    Dtype,
    DtypeOption,
    ModelArgument,
    ThreadsOption,
    note,
    output,
    set_up,
    table_lines,
)
from moekit.cli.engine import (
    CodecOption,
    DeviceOption,
    ExpertCacheOption,
    GpuMemoryOption,
    LowBitOption,
    MaxContextOption,
    MemoryOption,
    PolicyOption,
    PredictorOption,
    PrefetchOption,
    ResidentCodecOption,
    RunnerName,
    RunnerOption,
    SchedulerOption,
    ShareOption,
    SlotsOption,
    TraceOption,
    engine_options,
    opened_engine,
)
from moekit.core.errors import UserError
from moekit.core.memory import format_bytes

if TYPE_CHECKING:
    from socket import socket

    from moekit.runtime.engine import Engine
    from moekit.serve.service import Service

NEEDED = ("starlette", "uvicorn")
PACK_HINT = (
    "note: the model's own modules run streams one after another; --codec bf16 packs it once for "
    "native code, which runs them together"
)
LOCAL_HOSTS = {"127.0.0.1", "::1", "localhost"}


def serve(
    model: ModelArgument,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 for every one of this machine.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for any free one.")
    ] = 8000,
    memory: MemoryOption = None,
    expert_cache: ExpertCacheOption = None,
    max_streams: Annotated[int, typer.Option(min=1, help="Sequences generated at one time.")] = 8,
    max_context: MaxContextOption = None,
    queue: Annotated[
        int, typer.Option(min=0, help="Sequences that may wait; more are answered with 503.")
    ] = 64,
    chunk: Annotated[
        int,
        typer.Option(min=1, help="Prompt tokens of a step while other sequences generate."),
    ] = 128,
    prefix_reuse: Annotated[
        bool,
        typer.Option(
            "--prefix-reuse/--no-prefix-reuse",
            help="Go on from the cache of an earlier prompt with the same beginning.",
        ),
    ] = True,
    alike_first: Annotated[
        bool,
        typer.Option(
            "--alike-first",
            help="Of the queue, run together what has alike prompts and so needs the same experts.",
        ),
    ] = False,
    name: Annotated[
        str | None,
        typer.Option(help="The model's name in the API; by default that of its directory."),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="MOEKIT_API_KEY", show_envvar=True, help="Key that clients must send."),
    ] = None,
    max_body: Annotated[str, typer.Option(metavar="BYTES", help="Largest request.")] = "4MiB",
    grace: Annotated[
        float,
        typer.Option(min=0.0, help="Seconds that running requests get when the server ends."),
    ] = 10.0,
    access_log: Annotated[
        bool, typer.Option("--access-log", help="Print a line for every request.")
    ] = False,
    codec: CodecOption = None,
    resident_codec: ResidentCodecOption = None,
    policy: PolicyOption = None,
    predictor: PredictorOption = None,
    prefetch: PrefetchOption = None,
    trace: TraceOption = None,
    slots_per_layer: SlotsOption = None,
    share_experts: ShareOption = None,
    low_bit_fallback: LowBitOption = None,
    device: DeviceOption = None,
    gpu_memory: GpuMemoryOption = None,
    scheduler: SchedulerOption = None,
    runner: RunnerOption = RunnerName.auto,
    dtype: DtypeOption = Dtype.auto,
    threads: ThreadsOption = None,
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="Seeds the requests that give no seed.")
    ] = 0,
    dry_run: DryRunOption = False,
    requests: Annotated[
        str,
        typer.Option(
            metavar="PROMPT+ANSWERxCOUNT", help="The requests that --dry-run forecasts, in tokens."
        ),
    ] = "512+128x100",
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print one JSON object when ready, and nothing else."),
    ] = False,
) -> None:
    """Serve a model to clients of OpenAI's API."""
    if dry_run:
        from moekit.cli.run_engine import forecast

        planned = engine_options(
            memory=memory,
            expert_cache=expert_cache,
            codec=codec,
            resident_codec=resident_codec,
            policy=policy,
            trace=trace,
            max_context=max_context,
            streams=max_streams,
            runner=runner,
        )
        with output(as_json) as out:
            forecast(model, planned, threads, out, requests)
        return
    _check_extra()
    from moekit.core.load import resolve_model
    from moekit.core.memory import bytes_of
    from moekit.serve.server import bind

    # What is wrong with these is said before a model is read, which may take minutes.
    body_bytes = bytes_of(max_body)
    if api_key == "":
        raise UserError("--api-key is empty, and so would be no key: leave it out or set it")
    resolve_model(model)
    with bind(host, port) as bound:
        if api_key is None and host not in LOCAL_HOSTS:
            note(f"warning: {host} without --api-key lets anyone in who reaches this machine")
        set_up(seed, threads)
        options = engine_options(
            memory=memory,
            expert_cache=expert_cache,
            codec=codec,
            resident_codec=resident_codec,
            policy=policy,
            predictor=predictor,
            prefetch=prefetch,
            trace=trace,
            slots_per_layer=slots_per_layer,
            share_experts=share_experts,
            low_bit_fallback=low_bit_fallback,
            device=device,
            gpu_memory=gpu_memory,
            scheduler=scheduler,
            max_context=max_context,
            streams=max_streams,
            runner=runner,
        )
        # Before the engine is opened, which measures what the program takes.
        from moekit.serve.app import build_app
        from moekit.serve.guard import HttpLimits
        from moekit.serve.server import serve as answer
        from moekit.serve.service import Service

        with opened_engine(model, options, dtype, threads) as engine:
            if engine.budget is None and _native_could(engine):
                note(PACK_HINT)
            service = Service(
                engine,
                name or Path(model).resolve().name,
                queue=queue,
                chunk=chunk,
                reuse_prefixes=prefix_reuse,
                seed=seed,
                alike_first=alike_first,
            )
            answer(
                build_app(service, HttpLimits(body_bytes=body_bytes), api_key=api_key),
                service.scheduler,
                bound,
                grace=grace,
                on_ready=lambda: _announce(service, bound, as_json),
                access_log=access_log,
            )


def _check_extra() -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"moekit serve needs {' and '.join(missing)}: pip install 'moekit[serve]'")


def _native_could(engine: Engine) -> bool:
    from moekit.runtime.decoder_shape import NotSupportedError, decoder_shape

    try:
        decoder_shape(engine.config)
    except NotSupportedError:
        return False
    return True


def _announce(service: Service, bound: socket, as_json: bool) -> None:
    """Where the server is and what it can hold."""
    from moekit.serve.server import url

    limits, engine = service.limits, service.engine
    address = f"{url(bound)}/v1"
    if as_json:
        facts: dict[str, Any] = {
            "url": address,
            "model": service.name,
            "streams": limits.streams,
            "context": limits.context,
            "queue": limits.queue,
            "memory": None if engine.budget is None else engine.budget.to_dict(),
        }
        print(json.dumps(facts), flush=True)
        return
    lines = list(engine.notes)
    if engine.budget is not None:
        rows = [(part, format_bytes(count), why) for part, count, why in engine.budget.rows()]
        lines += table_lines(rows)
    lines.append(
        f"{limits.streams} streams of {limits.context} tokens, {limits.queue} more sequences queue"
    )
    print("\n".join([*lines, f"{service.name} at {address}"]), flush=True)
