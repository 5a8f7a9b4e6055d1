"""What every request passes: the API key, limits on size and patience, and counting."""

from __future__ import annotations

import asyncio
import hmac
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moekit.serve.errors import ApiError


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """Bytes of a body, seconds a client may take to send it, and to take what is sent to it."""

    body_bytes: int = 4 << 20
    receive_seconds: float = 30.0
    send_seconds: float = 30.0


class Guard:
    """ASGI middleware: refuses what has no key, drops clients that do not read, counts answers.

    `counted` holds the number of answers by (route, status); `routes` are those told apart.
    """

    def __init__(
        self, app: ASGIApp, limits: HttpLimits, api_key: str | None, routes: Iterable[str]
    ) -> None:
        self.counted: Counter[tuple[str, int]] = Counter()
        self._app = app
        self._limits = limits
        self._api_key = api_key
        self._routes = set(routes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        route = path if path in self._routes else "other"
        stalled = False

        async def patient_send(message: Message) -> None:
            nonlocal stalled
            if message["type"] == "http.response.start":
                self.counted[route, message["status"]] += 1
            try:
                async with asyncio.timeout(self._limits.send_seconds):
                    await send(message)
            except TimeoutError:
                stalled = True
                raise

        if self._api_key is not None and path.startswith("/v1/") and not self._has_key(scope):
            refusal = error_response(
                ApiError(401, "Wrong or missing API key", code="invalid_api_key")
            )
            await refusal(scope, receive, patient_send)
            return
        try:
            await self._app(scope, receive, patient_send)
        except TimeoutError:
            # A client that does not read loses its connection, which the server closes on a
            # response that ends too soon, and its slot.
            if not stalled:
                raise

    def _has_key(self, scope: Scope) -> bool:
        given = Headers(scope=scope).get("authorization", "")
        expected = f"Bearer {self._api_key}"
        # Compared in constant time, so that the time to the refusal does not give the key away.
        return hmac.compare_digest(given.encode(), expected.encode())


def error_response(error: ApiError) -> JSONResponse:
    """An error as the API writes it."""
    return JSONResponse(error.body, error.status, error.headers)


async def read_body(request: Request, limits: HttpLimits) -> bytes:
    """The JSON body; raises ApiError 408 if it takes too long, 413 if it is too large, 415."""
    # Browsers send other types to any address without asking, so a page could use the model.
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        message = f"Content-Type must be application/json, not {kind or 'absent'}"
        raise ApiError(415, message)
    too_large = ApiError(413, f"The body may have {limits.body_bytes} bytes at most")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > limits.body_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(limits.receive_seconds):
            async for part in request.stream():
                body += part
                if len(body) > limits.body_bytes:
                    raise too_large
    except TimeoutError as error:
        message = f"The body did not arrive within {limits.receive_seconds:g} seconds"
        raise ApiError(408, message) from error
    return bytes(body)
