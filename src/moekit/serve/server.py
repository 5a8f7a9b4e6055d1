"""Listening, and ending well: a signal lets running requests finish for a while, then cuts them."""

from __future__ import annotations

import copy
import errno
import signal
import socket
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.config import LOGGING_CONFIG

from moekit.core.errors import UserError
from moekit.serve.guard import Guard
from moekit.serve.scheduler import Scheduler

# Between cutting the last requests and closing their connections.
LAST_WORDS_SECONDS = 5.0


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to an address, not listening yet; UserError says why it cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise UserError(f"--host {host} is unknown: {error.strerror}") from error
    bound = socket.socket(family, kind, protocol)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
        # Two servers that are still loading can both bind; only one can listen.
        bound.listen()
    except OSError as error:
        bound.close()
        raise UserError(_why(error, host, port)) from error
    return bound


def _why(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"--port {port} of {host} is in use: choose another, or 0 for any free one"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"--host {host} is not an address of this machine: use 127.0.0.1, or 0.0.0.0 for all"
    if error.errno == errno.EACCES:
        return f"--port {port} may not be used without privileges: choose one of 1024 or more"
    return f"{host}:{port} cannot be listened on: {error.strerror}"


def url(bound: socket.socket) -> str:
    """The address of a bound socket, as a client gives it."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(
    app: Guard,
    scheduler: Scheduler,
    bound: socket.socket,
    *,
    grace: float,
    on_ready: Callable[[], None],
    access_log: bool = False,
) -> None:
    """Answer requests until SIGTERM or SIGINT, then return once all is at rest.

    Running requests have `grace` seconds to finish; a second SIGINT ends them at once.
    """
    config = uvicorn.Config(
        app,
        lifespan="off",
        log_level="info" if access_log else "error",
        access_log=access_log,
        log_config=_to_standard_error(),
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=int(grace + LAST_WORDS_SECONDS),
    )
    # uvicorn raises the signal again when it is done; by then there is nothing left to end.
    previous = {
        number: signal.signal(number, _ignore) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        _Server(config, scheduler, grace, on_ready).run(sockets=[bound])
    finally:
        scheduler.close(0)
        for number, handler in previous.items():
            signal.signal(number, handler)


def _to_standard_error() -> dict[str, Any]:
    # Standard output is for what the verb prints, such as --json.
    config = copy.deepcopy(LOGGING_CONFIG)
    config["handlers"]["access"]["stream"] = "ext://sys.stderr"
    return config


def _ignore(number: int, frame: FrameType | None) -> None:
    pass


class _Server(uvicorn.Server):
    def __init__(
        self,
        config: uvicorn.Config,
        scheduler: Scheduler,
        grace: float,
        on_ready: Callable[[], None],
    ) -> None:
        super().__init__(config)
        self._scheduler = scheduler
        self._grace = grace
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self.should_exit:
            threading.Thread(target=self._scheduler.close, args=(self._grace,)).start()
        super().handle_exit(sig, frame)
