import asyncio
import json
import re
import socket
import threading
import time

import pytest
from openai import APIError, APIStatusError, AsyncOpenAI

from moekit.runtime.detokenize import decode
from moekit.runtime.sampling import Sampling
from moekit.serve.app import build_app
from moekit.serve.guard import HttpLimits

from .fake import FakeRunner, expected
from .http import make_service, running

ASK = {"model": "fake", "prompt": "the router", "max_tokens": 8}
CHAT = {"model": "fake", "messages": [{"role": "user", "content": "hello"}]}


def until(holds) -> None:
    """Wait for another thread's doing; the time limit only ends a test that has failed."""
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, "waited for a minute"
        time.sleep(0.002)


def text_of(server, prompt: str, count: int, seed: int, sequence: int = 0) -> str:
    ids = server.tokenizer(prompt)["input_ids"]
    new = expected(ids, count, Sampling(seed=seed), sequence)
    whole = decode(server.tokenizer, ids + new)
    return whole[len(decode(server.tokenizer, ids)) :]


def test_32_concurrent_streams_get_their_own_text():
    with running(streams=32, context=256, queue=32) as server:
        prompts = [
            f"the router chooses {number} experts" * (1 + number % 5) for number in range(40)
        ]

        async def one(client: AsyncOpenAI, number: int) -> str:
            stream = await client.completions.create(
                model="fake", prompt=prompts[number], max_tokens=30, seed=number, stream=True
            )
            return "".join([chunk.choices[0].text async for chunk in stream])

        async def everyone() -> list[str]:
            url = f"http://127.0.0.1:{server.port}/v1"
            async with AsyncOpenAI(base_url=url, api_key="x", max_retries=0) as client:
                return await asyncio.gather(*[one(client, n) for n in range(len(prompts))])

        found = asyncio.run(everyone())
        assert found == [text_of(server, prompt, 30, n) for n, prompt in enumerate(prompts)]
        assert max(map(len, server.runner.steps)) > 8


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot(stream):
    with running(FakeRunner(gated=True), streams=1) as server:
        leaving = server.connect()
        body = json.dumps({**ASK, "max_tokens": 100, "stream": stream})
        leaving.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        server.runner.arrived.acquire()
        [job] = server.service.scheduler._slots.running.values()
        waiting = server.connect()
        waiting.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        until(lambda: server.service.scheduler.queued == 1)
        waiting.close()
        until(lambda: server.service.scheduler.queued == 0)  # one in the queue leaves at once
        if stream:
            server.runner.allow(1)
            response = leaving.getresponse()
            assert response.readline().startswith(b"data: ")
            response.close()
        leaving.close()
        until(lambda: job.cancelled)
        server.runner.open_gate()
        until(lambda: server.service.scheduler.running == 0)
        assert len(server.runner.steps) <= 3
        assert server.client().completions.create(**ASK, seed=1).choices[0].text == text_of(
            server, ASK["prompt"], 8, 1
        )


def test_a_full_queue_is_said_with_the_time_to_come_back():
    with running(FakeRunner(gated=True), streams=1, queue=1) as server:
        threads = [threading.Thread(target=server.call, args=("/v1/completions", ASK))]
        threads[0].start()
        server.runner.arrived.acquire()
        threads.append(threading.Thread(target=server.call, args=("/v1/completions", ASK)))
        threads[1].start()
        until(lambda: server.service.scheduler.queued == 1)
        status, body, headers = server.call("/v1/completions", ASK)
        assert (status, body["error"]["code"]) == (503, "queue_full")
        assert int(headers["retry-after"]) > 0
        assert server.metric("queue") == server.metric("streams") == 1
        with pytest.raises(APIStatusError, match="busy"):
            server.client().completions.create(**ASK, stream=True)
        server.runner.open_gate()
        for thread in threads:
            thread.join()
        status, body, _ = server.call("/v1/completions", {**ASK, "n": 3})
        assert status == 400
        assert "3 sequences; this server takes at most 2" in body["error"]["message"]


def test_the_key_is_asked_for():
    with running(api_key="secret") as server:
        for key in ("Bearer wrong", "secret", "Bearer sécret"):
            status, body, _ = server.call("/v1/models", Authorization=key)
            assert (status, body["error"]["code"]) == (401, "invalid_api_key")
        assert server.call("/v1/completions", ASK)[0] == 401
        assert server.call("/health")[0] == 200
        assert server.client(api_key="secret").models.list().data[0].id == "fake"


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"{", 400, "not JSON"),
        (b"[" * 100_000, 400, "not JSON"),
        (b"[]", 400, "must be a JSON object"),
        ({**ASK, "foo": 1}, 400, "Unrecognized request argument supplied: foo"),
        ({**ASK, "temperature": 3}, 400, "temperature should be less than or equal to 2, not 3"),
        ({**ASK, "temperature": "1"}, 400, 'temperature should be a valid number, not "1"'),
        ({**ASK, "n": 0}, 400, "n should be greater"),
        ({**ASK, "stop": [""]}, 400, "stop may not hold an empty string"),
        ({**ASK, "suffix": "x"}, 400, "suffix is not supported"),
        ({**ASK, "logit_bias": {"999": 1}}, 400, "no token id below 320"),
        ({**ASK, "prompt": [1, 400]}, 400, "Token 400 is not in the vocabulary of 320"),
        ({**ASK, "prompt": []}, 400, "prompt should have at least 1 item"),
        ({**ASK, "prompt": [[]]}, 400, "may not be empty"),
        ({**ASK, "prompt": [1, "a"]}, 400, "prompt.0 must be a string or a list of token ids"),
        (b'{"model": "fake", "prompt": "\\ud800"}', 400, "lone surrogate"),
        ({"model": "fake"}, 400, "You must provide prompt"),
        ({**ASK, "model": "gpt-4"}, 404, "'gpt-4' does not exist; this server has 'fake'"),
        ({**ASK, "max_tokens": 200}, 400, "maximum context length is 128 tokens, but you"),
        ({**ASK, "prompt": "the " * 200}, 400, "maximum context length is 128 tokens, but your"),
        ({**ASK, "stream_options": {}}, 400, "only allowed when stream is true"),
        ({**ASK, "user": "me", "best_of": 1, "seed": None}, 200, ""),
    ],
)
def test_wrong_requests_are_told_why(body, status, words):
    with running() as server:
        found, answer, _ = server.call("/v1/completions", body)
        assert found == status, answer
        if status != 200:
            assert words in answer["error"]["message"]
            assert answer["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"messages": []}, "messages should have at least 1 item"),
        ({"messages": [{"role": "boss", "content": "x"}]}, "messages.0.role should be 'system'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "'text' only"),
        ({"messages": [{"role": "user", "content": "x", "mood": 1}]}, "messages.0.mood"),
        ({"top_logprobs": 2}, "only allowed when logprobs is true"),
        ({"tools": [{"type": "function"}]}, "tools is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format is not supported"),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "may not have chat_template"),
        ({"max_tokens": 500}, "context length is 128 tokens, but you requested 5"),
    ],
)
def test_wrong_chats_are_told_why(changes, words):
    with running() as server:
        status, answer, _ = server.call("/v1/chat/completions", {**CHAT, **changes})
        assert status == 400
        assert words in answer["error"]["message"]


def test_no_chat_template_is_said():
    with running(chat_template=None) as server:
        status, answer, _ = server.call("/v1/chat/completions", CHAT)
        assert status == 400
        assert "no chat template, so it cannot chat: use /v1/completions" in str(answer)
    raising = "{{ raise_exception('only one system message, please') }}"
    with running(chat_template=raising) as server:
        status, answer, _ = server.call("/v1/chat/completions", CHAT)
        assert status == 400
        assert "only one system message, please" in answer["error"]["message"]


def test_templates_get_their_own_arguments():
    template = "{{ mood }}{% for m in messages %}{{ m['role'] }}{% endfor %}"
    with running(chat_template=template) as server:
        asked = {**CHAT, "messages": [{"role": "developer", "content": "x"}], "max_tokens": 1}
        for mood in ("", "merry"):
            body = {**asked, "chat_template_kwargs": {"mood": mood}}
            _, answer, _ = server.call("/v1/chat/completions", body)
            wanted = len(server.tokenizer(f"{mood}system")["input_ids"])
            assert answer["usage"]["prompt_tokens"] == wanted


def test_wrong_ways_in():
    with running() as server:
        for path, method, status in [
            ("/v1/nothing", "GET", 404),
            ("/v1/completions", "GET", 405),
            ("/v1/models/other", "GET", 404),
        ]:
            found, answer, _ = server.call(path, method=method)
            assert (found, answer["error"]["type"]) == (status, "invalid_request_error")
        status, answer, _ = server.call(
            "/v1/completions", b"{}", **{"Content-Type": "application/x-www-form-urlencoded"}
        )
        assert status == 415
        assert "must be application/json" in answer["error"]["message"]


def test_bodies_are_limited_in_size_and_time():
    limits = HttpLimits(body_bytes=1000, receive_seconds=0.05)
    with running(limits=limits) as server:
        large = {**ASK, "prompt": "x" * 2000}
        assert server.call("/v1/completions", large)[0] == 413
        chunked = server.connect()
        headers = {"Content-Type": "application/json"}
        parts = (b"x" * 400 for _ in range(5))
        chunked.request("POST", "/v1/completions", parts, headers, encode_chunked=True)
        assert chunked.getresponse().status == 413
        slow = socket.create_connection(("127.0.0.1", server.port), timeout=60)
        slow.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 900\r\n\r\n{"
        )
        assert slow.recv(100).startswith(b"HTTP/1.1 408")
        slow.close()


def visit(app, message: dict, send, *after: dict) -> None:
    """Call the application without a server: a body, what else is received, and where to send."""
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }

    async def call() -> None:
        arriving = asyncio.Queue()
        for event in ({"type": "http.request", "body": json.dumps(message).encode()}, *after):
            arriving.put_nowait(event)
        await app(scope, arriving.get, send)

    asyncio.run(call())


def test_a_client_that_does_not_read_loses_its_slot_and_its_connection():
    runner = FakeRunner(gated=True)
    service = make_service(runner)
    sent = []

    async def send(message) -> None:
        sent.append(message["type"])
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()  # a buffer that stays full

    runner.allow(1)
    # It returns with the response unfinished, on which a server closes the connection.
    app = build_app(service, HttpLimits(send_seconds=0.05))
    visit(app, {**ASK, "max_tokens": 100, "stream": True}, send)
    assert sent == ["http.response.start", "http.response.body"]
    runner.open_gate()
    until(lambda: service.scheduler.running == 0)
    assert service.scheduler.statistics.sequences == {"cancelled": 1}
    service.scheduler.close(0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_has_left_before_the_first_token(stream):
    runner = FakeRunner(gated=True)
    service = make_service(runner)

    async def send(message) -> None:
        pass

    message = {**ASK, "max_tokens": 100, "stream": stream}
    visit(build_app(service), message, send, {"type": "http.disconnect"})
    runner.open_gate()
    until(lambda: service.scheduler.running == service.scheduler.queued == 0)
    assert not service.scheduler.statistics.sequences["length"]
    service.scheduler.close(0)


def test_an_error_of_the_model_reaches_the_client(capfd):
    runner = FakeRunner()
    runner.fail_on = 13
    with running(runner) as server:
        ask = {**ASK, "prompt": [1, 13, 2]}
        status, body, _ = server.call("/v1/completions", ask)
        assert (status, body["error"]["type"]) == (500, "server_error")
        assert "cannot read the expert of token 13" in body["error"]["message"]
        with pytest.raises(APIError, match="cannot read the expert"):
            list(server.client().completions.create(**ask, stream=True))
        bias = {"13": -100}
        assert server.call("/v1/completions", {**ASK, "logit_bias": bias})[0] == 200
    assert "OSError" in capfd.readouterr().err


def test_shutting_down_cuts_streams_with_an_error():
    with running(FakeRunner(gated=True)) as server:
        stream = server.client().completions.create(**{**ASK, "max_tokens": 100}, stream=True)
        server.runner.allow(1)
        assert next(iter(stream)).choices[0].text
        closing = threading.Thread(target=server.service.scheduler.close, args=(0,))
        closing.start()
        until(lambda: server.service.scheduler._cut)
        server.runner.open_gate()
        with pytest.raises(APIError, match="shutting down"):
            list(stream)
        closing.join()
        assert server.call("/health")[0] == 503
        status, body, headers = server.call("/v1/completions", ASK)
        assert (status, body["error"]["code"]) == (503, "shutting_down")
        assert "retry-after" in headers


def test_choices_are_numbered_and_each_has_its_own_draw():
    with running() as server:
        client = server.client()
        prompts = ["zwei", "Experten"]
        done = client.completions.create(model="fake", prompt=prompts, n=2, max_tokens=9, seed=5)
        wanted = [text_of(server, prompts[index // 2], 9, 5, sequence=index) for index in range(4)]
        assert [choice.text for choice in done.choices] == wanted
        assert [choice.index for choice in done.choices] == [0, 1, 2, 3]
        stream = client.completions.create(
            model="fake", prompt=prompts, n=2, max_tokens=9, seed=5, stream=True
        )
        texts = dict.fromkeys(range(4), "")
        for chunk in stream:
            texts[chunk.choices[0].index] += chunk.choices[0].text
        assert list(texts.values()) == wanted


def test_requests_without_a_seed_differ():
    with running() as server:
        texts = {server.call("/v1/completions", ASK)[1]["choices"][0]["text"] for _ in range(3)}
        assert len(texts) == 3


def test_end_tokens_end_and_do_not_show():
    with running() as server:
        ids = server.tokenizer(ASK["prompt"])["input_ids"]
        wanted = expected(ids, 8, Sampling(seed=1))
    ends = [wanted[3]]
    with running(end_tokens=ends) as server:
        done = server.client().completions.create(**ASK, seed=1, logprobs=0)
        [choice] = done.choices
        assert choice.finish_reason == "stop"
        shown = wanted[: wanted.index(ends[0])]
        assert choice.text == decode(server.tokenizer, ids + shown)[len(ASK["prompt"]) :]
        assert len(choice.logprobs.tokens) == len(shown)
        assert done.usage.completion_tokens == len(shown) + 1
        more = server.client().completions.create(**ASK, seed=1, extra_body={"ignore_eos": True})
        assert more.usage.completion_tokens == 8


def test_metrics_are_prometheus_text():
    with running() as server:
        server.call("/v1/completions", ASK)
        server.call("/v1/completions", ASK)
        server.call("/v1/unheard/of", ASK)
        _, page, headers = server.call("/metrics")
        assert headers["content-type"].startswith("text/plain; version=0.0.4")
        assert server.metric("generated_tokens_total") == 16
        assert server.metric("reused_tokens_total") > 0
        assert server.metric("tokens_per_second") > 0
        assert 'moekit_requests_total{route="/v1/completions",status="200"} 2' in page
        assert 'moekit_requests_total{route="other",status="404"} 1' in page
        assert 'moekit_sequences_total{reason="length"} 2' in page
        sample = re.compile(r'moekit_\w+(\{\w+="[^"]*"(,\w+="[^"]*")*\})? [0-9.e+-]+')
        comment = re.compile(r"# (HELP|TYPE) moekit_\w+ .+")
        for line in page.splitlines():
            assert sample.fullmatch(line) or comment.fullmatch(line), line
