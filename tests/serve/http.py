"""A server over the fake runner, on a thread of this process."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import uvicorn
from openai import OpenAI

from moekit.runtime.engine import Engine
from moekit.serve.app import build_app
from moekit.serve.guard import HttpLimits
from moekit.serve.server import bind
from moekit.serve.service import Service
from tests.cli.conftest import CHAT_TEMPLATE
from tests.models import tiny_tokenizer

from .fake import VOCAB, FakeRunner


@dataclass
class Running:
    """A server under test."""

    port: int
    runner: FakeRunner
    service: Service
    tokenizer: Any

    def client(self, **options: Any) -> OpenAI:
        options = {"api_key": "none", "max_retries": 0, "timeout": 60, **options}
        return OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", **options)

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def call(
        self, path: str, body: Any = None, method: str | None = None, **headers: str
    ) -> tuple[int, Any, dict[str, str]]:
        """Status, body and headers of one request; a dict goes out as JSON."""
        raw = json.dumps(body).encode() if isinstance(body, dict | list) else body
        headers = {"Content-Type": "application/json", **headers}
        connection = self.connect()
        connection.request(method or ("POST" if raw is not None else "GET"), path, raw, headers)
        response = connection.getresponse()
        text = response.read().decode()
        found = {name.lower(): value for name, value in response.getheaders()}
        connection.close()
        is_json = found.get("content-type") == "application/json"
        return response.status, json.loads(text) if is_json else text, found

    def metric(self, name: str) -> float:
        _, page, _ = self.call("/metrics")
        line = next(line for line in page.splitlines() if line.startswith(f"moekit_{name} "))
        return float(line.split()[1])


def make_service(
    runner: FakeRunner,
    *,
    streams: int = 4,
    context: int = 128,
    queue: int = 8,
    chat_template: str | None = CHAT_TEMPLATE,
    end_tokens: list[int] | None = None,
) -> Service:
    text_config = SimpleNamespace(vocab_size=VOCAB)
    engine = Engine(
        runner,
        spec=None,
        config=SimpleNamespace(get_text_config=lambda decoder: text_config),
        generation_config=SimpleNamespace(eos_token_id=end_tokens),
        tokenizer=tiny_tokenizer(chat_template),
        max_context=context,
        streams=streams,
    )
    return Service(engine, "fake", queue=queue)


@contextmanager
def running(
    runner: FakeRunner | None = None,
    *,
    api_key: str | None = None,
    limits: HttpLimits | None = None,
    **options: Any,
) -> Iterator[Running]:
    runner = runner or FakeRunner()
    service = make_service(runner, **options)
    bound = bind("127.0.0.1", 0)
    config = uvicorn.Config(
        build_app(service, limits, api_key=api_key), lifespan="off", log_level="critical"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([bound])))
    thread.start()
    try:
        yield Running(bound.getsockname()[1], runner, service, service.engine.tokenizer)
    finally:
        runner.open_gate()
        service.scheduler.close(0)
        server.should_exit = True
        thread.join()
    assert runner.live == []
