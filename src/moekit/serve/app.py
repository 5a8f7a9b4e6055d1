"""The routes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from moekit.serve.answer import Answer, Update
from moekit.serve.errors import ApiError
from moekit.serve.guard import Guard, HttpLimits, error_response, read_body
from moekit.serve.metrics import metrics
from moekit.serve.requests import ChatRequest, CompletionRequest, GenerationRequest, parse
from moekit.serve.responses import ChatForm, CompletionForm, Form
from moekit.serve.service import Service

# What proxies log where the client left before there was an answer.
CLIENT_LEFT = 499


def build_app(
    service: Service, limits: HttpLimits | None = None, *, api_key: str | None = None
) -> Guard:
    """The ASGI application that serves one model."""
    limits = limits or HttpLimits()

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_card(service)]})

    async def model(request: Request) -> Response:
        service.check_model(request.path_params["name"])
        return JSONResponse(_card(service))

    async def completions(request: Request) -> Response:
        asked = parse(CompletionRequest, await read_body(request, limits))
        form = CompletionForm(
            service.name,
            service.names,
            logprobs=asked.logprobs is not None,
            usage_in_chunks=asked.stream and asked.wants_usage,
        )
        return await _respond(request, asked, await service.complete(asked), form)

    async def chat(request: Request) -> Response:
        asked = parse(ChatRequest, await read_body(request, limits))
        form = ChatForm(
            service.name,
            service.names,
            logprobs=asked.logprobs,
            usage_in_chunks=asked.stream and asked.wants_usage,
        )
        return await _respond(request, asked, await service.chat(asked), form)

    async def health(request: Request) -> Response:
        if service.scheduler.is_open:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "closing"}, 503)

    async def counts(request: Request) -> Response:
        return PlainTextResponse(
            metrics(service, guard.counted), media_type="text/plain; version=0.0.4"
        )

    routes = [
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/health", health),
        Route("/metrics", counts),
    ]
    app = Starlette(
        routes=routes,
        exception_handlers={
            ApiError: lambda request, error: error_response(error),
            HTTPException: _no_such_route,
            ClientDisconnect: lambda request, error: Response(status_code=CLIENT_LEFT),
            Exception: lambda request, error: error_response(ApiError(500, "Internal error")),
        },
    )
    guard = Guard(app, limits, api_key, [route.path for route in routes])
    return guard


def _card(service: Service) -> dict[str, Any]:
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "moekit",
        "max_model_len": service.limits.context,
    }


def _no_such_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    words = {404: "Unknown request URL", 405: "Wrong method for this URL"}
    message = f"{words.get(error.status_code, error.detail)}: {request.method} {request.url.path}"
    return error_response(ApiError(error.status_code, message))


async def _respond(
    request: Request, asked: GenerationRequest, answer: Answer, form: Form
) -> Response:
    if asked.stream:
        return EventStream(answer, _events(answer, form, asked))
    work = asyncio.ensure_future(_collect(answer))
    left = asyncio.ensure_future(_wait_until_gone(request))
    try:
        await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            return Response(status_code=CLIENT_LEFT)
        return JSONResponse(form.whole(work.result(), answer.usage()))
    finally:
        left.cancel()
        work.cancel()
        answer.cancel()


class EventStream(StreamingResponse):
    """Server-sent events; a client that leaves frees its slots, even before the first of them."""

    def __init__(self, answer: Answer, events: AsyncIterator[bytes]) -> None:
        # The headers keep caches and nginx from collecting what should be passed on at once.
        super().__init__(
            events,
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.cancel()


async def _wait_until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _collect(answer: Answer) -> list[Update]:
    """One update for each choice, in their order."""
    whole: dict[int, Update] = {}
    async for update in answer.updates():
        found = whole.setdefault(update.index, update)
        if found is not update:
            found.piece.text += update.piece.text
            found.piece.logprobs += update.piece.logprobs
            found.finish_reason = update.finish_reason
    return [whole[index] for index in sorted(whole)]


async def _events(answer: Answer, form: Form, asked: GenerationRequest) -> AsyncIterator[bytes]:
    """The answer as server-sent events."""
    try:
        for chunk in form.opening(answer.size):
            yield _event(chunk)
        async for update in answer.updates():
            yield _event(form.chunk(update))
        if asked.wants_usage:
            yield _event(form.usage_chunk(answer.usage()))
        yield b"data: [DONE]\n\n"
    except ApiError as error:
        yield _event(error.body)


def _event(chunk: dict[str, Any]) -> bytes:
    text = json.dumps(chunk, ensure_ascii=False, separators=(",", ":"))
    return b"data: " + text.encode() + b"\n\n"
