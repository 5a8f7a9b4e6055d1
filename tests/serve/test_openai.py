"""The official client against a server process on a tiny model."""

import asyncio
import importlib.util
import json
import signal
import socket
from contextlib import contextmanager
from types import SimpleNamespace

import openai
import pytest
import torch
from openai import AsyncOpenAI, OpenAI

from moekit.core.load import load
from moekit.runtime.generate import decode
from tests.cli.conftest import CHAT_TEMPLATE, start
from tests.models import CONTEXT, write_tiny_model

PROMPT = "the router chooses two"
MESSAGES = [{"role": "user", "content": "zwei Experten"}]


@contextmanager
def serving(model, *options, port=0):
    """A server process; yields it with the line it printed when it was ready."""
    process = start("serve", model, "--port", port, "--json", "--dtype", "float32", *options)
    try:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        ready = json.loads(line)
        client = OpenAI(base_url=ready["url"], api_key="x", max_retries=0, timeout=60)
        yield SimpleNamespace(process=process, client=client, **ready)
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("serve") / "tiny", CHAT_TEMPLATE)


@pytest.fixture(scope="module")
def server(model):
    with serving(model, "--max-streams", "32") as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    return server.client


@pytest.fixture(scope="module")
def loaded(model):
    return load(model, "float32")


def greedy(loaded, ids, count: int) -> list[int]:
    """What transformers generates."""
    ids = torch.tensor([ids])
    made = loaded.model.generate(ids, max_new_tokens=count, do_sample=False)
    return made[0, ids.shape[1] :].tolist()


def continuation(loaded, ids, new) -> str:
    return decode(loaded.tokenizer, [*ids, *new])[len(decode(loaded.tokenizer, ids)) :]


def test_models(client):
    [card] = client.models.list().data
    assert card.id == "tiny"
    assert client.models.retrieve("tiny") == card
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
        client.completions.create(model="other", prompt="x")


def test_completion_is_that_of_transformers(client, loaded):
    ids = loaded.tokenizer(PROMPT)["input_ids"]
    wanted = continuation(loaded, ids, greedy(loaded, ids, 20))
    for prompt in (PROMPT, ids):
        done = client.completions.create(model="tiny", prompt=prompt, max_tokens=20, temperature=0)
        assert done.choices[0].text == wanted
        assert done.choices[0].finish_reason == "length"
        usage = done.usage
        assert (usage.prompt_tokens, usage.completion_tokens) == (len(ids), 20)
        assert usage.total_tokens == len(ids) + 20
    assert usage.prompt_tokens_details.cached_tokens == len(ids) - 1


def test_chat_is_that_of_transformers(client, loaded):
    ids = loaded.tokenizer.apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_dict=True
    )["input_ids"]
    wanted = decode(loaded.tokenizer, greedy(loaded, ids, 12))
    asked = {"model": "tiny", "messages": MESSAGES, "temperature": 0}
    done = client.chat.completions.create(**asked, max_completion_tokens=12)
    assert done.choices[0].message.content == wanted
    assert done.choices[0].message.role == "assistant"
    assert done.usage.prompt_tokens == len(ids)
    parts = [{"role": "user", "content": [{"type": "text", "text": MESSAGES[0]["content"]}]}]
    same = client.chat.completions.create(**{**asked, "messages": parts}, max_tokens=12)
    assert same.choices[0].message.content == wanted
    # Without a limit it goes on to the end of the context.
    long = client.chat.completions.create(**asked)
    assert long.usage.total_tokens == CONTEXT
    assert long.choices[0].finish_reason == "length"


def test_streams_add_up_to_the_whole(client):
    asked = {"model": "tiny", "max_tokens": 25, "seed": 3}
    usage = {"include_usage": True}
    whole = client.completions.create(prompt=PROMPT, **asked)
    chunks = list(
        client.completions.create(prompt=PROMPT, stream=True, stream_options=usage, **asked)
    )
    assert "".join(c.choices[0].text for c in chunks[:-1]) == whole.choices[0].text
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 25
    # How many tokens a chunk holds depends on how fast the client reads.
    assert len(chunks) > 1
    whole = client.chat.completions.create(messages=MESSAGES, **asked)
    chunks = list(
        client.chat.completions.create(
            messages=MESSAGES, stream=True, stream_options=usage, **asked
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks[:-1])
    assert text == whole.choices[0].message.content
    reasons = [c.choices[0].finish_reason for c in chunks[:-1]]
    assert reasons == [None] * (len(reasons) - 1) + ["length"]
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_over_token_borders(client, stream):
    asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 30, "seed": 4}
    whole = client.completions.create(**asked).choices[0].text
    for begin in range(0, len(whole) - 3, 5):
        stop = whole[begin : begin + 3]
        done = client.completions.create(**asked, stop=[stop, "unheard of"], stream=stream)
        chunks = list(done) if stream else [done]
        assert "".join(c.choices[0].text for c in chunks) == whole.partition(stop)[0]
        assert chunks[-1].choices[0].finish_reason == "stop"


def test_seeds(client):
    def text(seed, **options):
        asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 15, "seed": seed, **options}
        return client.completions.create(**asked).choices[0].text

    assert text(1) == text(1)
    assert text(1) != text(2)
    assert text(1, top_p=0.5) == text(1, top_p=0.5)
    assert text(1, extra_body={"top_k": 1}) == text(2, temperature=0)
    assert text(1, frequency_penalty=2, presence_penalty=2) != text(1)


def test_logprobs_are_the_models(client, loaded):
    ids = loaded.tokenizer(PROMPT)["input_ids"]
    done = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=6, temperature=0, logprobs=3, echo=True
    )
    found = done.choices[0].logprobs
    new = greedy(loaded, ids, 6)
    with torch.inference_mode():
        logits = loaded.model(torch.tensor([[*ids, *new]])).logits[0]
    logs = logits.log_softmax(-1)[:-1].gather(1, torch.tensor([*ids, *new])[1:, None])[:, 0]
    assert found.token_logprobs[0] is None
    # Two float32 computations of the same logits, of chunks and of the whole.
    assert found.token_logprobs[1:] == pytest.approx(logs.tolist(), abs=1e-4)
    assert done.choices[0].text.startswith(PROMPT)
    assert found.text_offset[: len(ids)] == [
        len(decode(loaded.tokenizer, ids[:n])) for n in range(len(ids))
    ]
    assert len(found.top_logprobs[-1]) in (3, 4)
    scored = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=0, logprobs=0, echo=True
    )
    assert scored.choices[0].text == PROMPT
    assert scored.choices[0].logprobs.token_logprobs[1:] == pytest.approx(
        found.token_logprobs[1 : len(ids)], abs=1e-4
    )


def test_logprobs_of_a_chat(client):
    asked = {"model": "tiny", "messages": MESSAGES, "max_tokens": 8, "seed": 1}
    done = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    content = done.choices[0].logprobs.content
    raw = b"".join(bytes(entry.bytes) for entry in content)
    assert raw.decode(errors="replace") == done.choices[0].message.content
    assert all(len(entry.top_logprobs) == 2 for entry in content)
    assert all(entry.logprob <= entry.top_logprobs[0].logprob for entry in content)
    chunks = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2, stream=True)
    streamed = [
        entry
        for chunk in chunks
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert [entry.token for entry in streamed] == [entry.token for entry in content]


def test_errors_are_the_clients_own(client):
    with pytest.raises(openai.BadRequestError, match=f"maximum context length is {CONTEXT} tokens"):
        client.completions.create(model="tiny", prompt=PROMPT, max_tokens=CONTEXT)
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="the " * CONTEXT)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="temperature") as caught:
        client.completions.create(model="tiny", prompt="x", temperature=9)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="Unrecognized request argument"):
        client.completions.create(model="tiny", prompt="x", extra_body={"depth": 3})


def test_32_concurrent_streams_none_lost_or_mixed_up(server, client):
    def asked(number):
        prompt = f"{'der Router wählt ' * (number % 4)}{number}"
        return {"model": "tiny", "prompt": prompt, "max_tokens": 16 + number, "seed": number}

    alone = [client.completions.create(**asked(n)).choices[0].text for n in range(32)]

    async def stream(crowd: AsyncOpenAI, number: int) -> str:
        chunks = await crowd.completions.create(**asked(number), stream=True)
        return "".join([chunk.choices[0].text async for chunk in chunks])

    async def everyone() -> list[str]:
        async with AsyncOpenAI(base_url=server.url, api_key="x", max_retries=0) as crowd:
            return await asyncio.gather(*[stream(crowd, n) for n in range(32)])

    assert asyncio.run(everyone()) == alone


def test_a_killed_server_answers_again_at_the_same_place(model):
    asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 9, "seed": 1}
    with serving(model) as first:
        text = first.client.completions.create(**asked).choices[0].text
        port = int(first.url.rsplit(":", 1)[1].partition("/")[0])
        first.process.kill()
        first.process.wait()
        with pytest.raises(openai.APIConnectionError):
            first.client.completions.create(**asked)
        with serving(model, port=port):
            assert first.client.completions.create(**asked).choices[0].text == text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_cleanly(model, number):
    with serving(model) as server:
        stream = server.client.completions.create(
            model="tiny", prompt="x", max_tokens=50, stream=True
        )
        next(iter(stream))
        server.process.send_signal(number)
        # The running stream still gets its end.
        assert list(stream)[-1].choices[0].finish_reason == "length"
        out, err = server.process.communicate(timeout=60)
        assert (server.process.returncode, out) == (0, "")
        assert err.startswith("note: the model's own modules run streams one after another")
        assert len(err.splitlines()) == 1


def test_the_access_log_leaves_standard_output_alone(model):
    with serving(model, "--access-log") as server:
        server.client.models.list()
        server.process.terminate()
        out, err = server.process.communicate(timeout=60)
    assert out == ""
    assert '"GET /v1/models HTTP/1.1" 200' in err


def test_an_api_key_from_the_environment(model):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEKIT_API_KEY", "secret")
        with serving(model, "--name", "mine", "--max-streams", "2") as server:
            with pytest.raises(openai.AuthenticationError):
                server.client.models.list()
            assert server.client.with_options(api_key="secret").models.list().data[0].id == "mine"
            assert server.streams == 2


def test_what_cannot_be_served_is_said_at_once(model, refused, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"--port {port} of 127.0.0.1 is in use" in refused("serve", model, "--port", port)
    assert "--host nowhere.invalid is unknown" in refused(
        "serve", model, "--host", "nowhere.invalid"
    )
    assert "no such" in refused("serve", "/not/there").lower()
    assert "--api-key is empty" in refused("serve", model, "--api-key", "")
    long = refused("serve", model, "--port", 0, "--max-context", 500)
    assert f"max_context 500 is more than the model's {CONTEXT} tokens" in long
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name)
    )
    assert refused("serve", model) == (
        "error: moekit serve needs uvicorn: pip install 'moekit[serve]'\n"
    )
