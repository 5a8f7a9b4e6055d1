"""`moekit serve`."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from moekit.cli.common import (
    Dtype,
    DtypeOption,
    ModelArgument,
    ThreadsOption,
    note,
    set_up,
    table_lines,
)
from moekit.core.errors import UserError

LOCAL_HOSTS = {"127.0.0.1", "::1", "localhost"}


def serve(
    model: ModelArgument,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 for every one of this machine.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for any free one.")
    ] = 8000,
    memory: Annotated[
        str | None,
        typer.Option(metavar="BYTES|auto", help="Limit of the process's memory, as 6GiB."),
    ] = None,
    max_streams: Annotated[
        int | None, typer.Option(min=1, help="Sequences generated at one time.")
    ] = None,
    max_context: Annotated[
        int | None, typer.Option(min=2, help="Tokens of prompt and answer; at most the model's.")
    ] = None,
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
    dtype: DtypeOption = Dtype.auto,
    threads: ThreadsOption = None,
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="Seeds the requests that give no seed.")
    ] = 0,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print one JSON object when ready, and nothing else."),
    ] = False,
) -> None:
    """Serve a model to clients of OpenAI's API."""
    _check_extra()
    from moekit.core.load import resolve_model
    from moekit.core.memory import bytes_of
    from moekit.serve.server import bind, url
    from moekit.serve.server import serve as run

    body_bytes = bytes_of(max_body)
    resolve_model(model)
    bound = bind(host, port)
    set_up(seed, threads)

    import moekit
    from moekit.serve.app import build_app
    from moekit.serve.guard import HttpLimits
    from moekit.serve.service import Service

    with moekit.open_engine(
        model,
        memory,
        threads,
        dtype=None if dtype is Dtype.auto else dtype.value,
        max_context=max_context,
        streams=max_streams,
    ) as engine:
        if engine.tokenizer is None:
            raise UserError(f"{model} has no tokenizer, so it cannot read text")
        service = Service(
            engine,
            name or Path(model).resolve().name,
            queue=queue,
            chunk=chunk,
            reuse_prefixes=prefix_reuse,
            seed=seed,
        )
        app = build_app(service, HttpLimits(body_bytes=body_bytes), api_key=api_key)
        address = url(bound)

        def ready() -> None:
            facts = _facts(service, address)
            print(json.dumps(facts) if as_json else _lines(facts), flush=True)

        if api_key is None and host not in LOCAL_HOSTS:
            note(f"warning: {host} without --api-key lets anyone who reaches this machine in")
        run(app, service.scheduler, bound, grace=grace, on_ready=ready, access_log=access_log)


def _check_extra() -> None:
    missing = [n for n in ("starlette", "uvicorn") if importlib.util.find_spec(n) is None]
    if missing:
        raise UserError(f"moekit serve needs {' and '.join(missing)}: pip install 'moekit[serve]'")


def _facts(service: Any, address: str) -> dict[str, Any]:
    limits = service.limits
    return {
        "url": f"{address}/v1",
        "model": service.name,
        "streams": limits.streams,
        "context": limits.context,
        "queue": limits.queue,
    }


def _lines(facts: dict[str, Any]) -> str:
    rows = [[key, value] for key, value in facts.items()]
    return "\n".join([f"{facts['model']} at {facts['url']}", *table_lines(rows)])
