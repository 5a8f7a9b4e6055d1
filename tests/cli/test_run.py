import io
import os
import pty
import signal
import time
from pathlib import Path

import pytest
import torch

from moekit.core.load import load
from moekit.runtime.generate import TextStream, decode
from tests.interrupts import INTERRUPTED
from tests.models import CONTEXT

from .conftest import start

PROMPT = "der Router"
GREEDY = ("--no-do-sample", "--max-new-tokens", "8")


@pytest.fixture(scope="module")
def loaded(tiny):
    return load(tiny)


def set_stdin(monkeypatch, raw):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(raw)))


def test_json_is_what_transformers_generates(moekit, tiny, loaded):
    result = moekit("run", tiny, PROMPT, "--json", *GREEDY).json
    encoded = loaded.tokenizer(PROMPT, return_tensors="pt")
    expected = loaded.model.generate(**encoded, max_new_tokens=8, do_sample=False)[0]
    count = encoded["input_ids"].shape[1]
    assert result["token_ids"] == expected[count:].tolist()
    assert result["text"] == decode(loaded.tokenizer, expected[count:])
    assert (result["prompt_tokens"], result["new_tokens"]) == (count, 8)
    assert result["finish_reason"] == "length"
    assert 0 < result["prefill_seconds"] < result["seconds"]
    assert result["tokens_per_second"] == pytest.approx(
        7 / (result["seconds"] - result["prefill_seconds"])
    )


def test_streams_the_same_text(moekit, tiny):
    text = moekit("run", tiny, PROMPT, "--json", *GREEDY).json["text"]
    done = moekit("run", tiny, PROMPT, *GREEDY)
    assert done.out == text + "\n"
    assert "tokens/s" in done.err


def test_prompt_from_file_and_standard_input(moekit, tiny, tmp_path, monkeypatch):
    expected = moekit("run", tiny, PROMPT, "--json", *GREEDY).json["text"]
    (tmp_path / "prompt.txt").write_text(PROMPT + "\n")
    assert moekit("run", tiny, "-f", tmp_path / "prompt.txt", "--json", *GREEDY).json["text"] == (
        expected
    )
    for args in ((), ("-",)):
        set_stdin(monkeypatch, PROMPT.encode() + b"\n")
        assert moekit("run", tiny, *args, "--json", *GREEDY).json["text"] == expected


def test_sampling_is_seeded(moekit, tiny):
    def text(seed):
        args = ("--temperature", "2", "--top-k", "50", "--seed", seed, "--max-new-tokens", "8")
        return moekit("run", tiny, PROMPT, "--json", *args).json["text"]

    assert text(1) == text(1) != text(2)


def test_beam_search_prints_at_the_end(moekit, tiny):
    result = moekit("run", tiny, PROMPT, "--num-beams", "2", *GREEDY, "--json").json
    assert result["new_tokens"] == 8
    assert result["prefill_seconds"] is None
    assert moekit("run", tiny, PROMPT, "--num-beams", "2", *GREEDY).out == result["text"] + "\n"


def test_chat_template_is_used_where_there_is_one(moekit, tiny_chat, loaded):
    result = moekit("run", tiny_chat, PROMPT, "--json", *GREEDY).json
    templated = loaded.tokenizer(f"user: {PROMPT}\nassistant:")["input_ids"]
    assert result["prompt_tokens"] == len(templated)
    plain = moekit("run", tiny_chat, PROMPT, "--json", "--no-chat", *GREEDY).json
    assert plain["prompt_tokens"] == len(loaded.tokenizer(PROMPT)["input_ids"])


def test_empty_prompt_starts_at_the_end_token(moekit, tiny):
    assert moekit("run", tiny, "", "--json", *GREEDY).json["prompt_tokens"] == 1


def test_default_length_is_what_the_context_holds(moekit, tiny):
    result = moekit("run", tiny, PROMPT, "--no-do-sample", "--json").json
    assert result["prompt_tokens"] + result["new_tokens"] == CONTEXT


def test_generation_stops_at_an_end_token(loaded):
    from moekit.runtime.generate import encode_prompt, generate

    encoded = encode_prompt(loaded.tokenizer, PROMPT)
    free = generate(loaded.model, loaded.tokenizer, encoded, max_new_tokens=8, do_sample=False)
    loaded.model.generation_config.eos_token_id = free.token_ids[2]
    try:
        cut = generate(loaded.model, loaded.tokenizer, encoded, max_new_tokens=8, do_sample=False)
    finally:
        loaded.model.generation_config.eos_token_id = None
    assert cut.finish_reason == "stop"
    first = free.token_ids.index(free.token_ids[2])
    assert cut.token_ids == free.token_ids[: first + 1]


@pytest.mark.parametrize("text", ["日本語 naïve 🙂 end", "plain", "🙂"])
def test_stream_holds_back_unfinished_characters(loaded, text):
    pieces = []
    stream = TextStream(loaded.tokenizer, pieces.append)
    stream.put(torch.tensor([[1, 2, 3]]))
    for token in loaded.tokenizer(text)["input_ids"]:
        stream.put(torch.tensor([token]))
    stream.end()
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_stream_loses_nothing_of_broken_text(loaded):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 320, (200,), generator=generator).tolist()
    pieces = []
    stream = TextStream(loaded.tokenizer, pieces.append)
    stream.put(torch.tensor([[0]]))
    for token in ids:
        stream.put(torch.tensor([token]))
    stream.end()
    assert "".join(pieces) == decode(loaded.tokenizer, ids)
    assert len(pieces) > 50


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("x" * 200,), "tokens and the model's context is 64: shorten the prompt to at most 63"),
        ((PROMPT, "--max-new-tokens", "64"), "together 6.*context is 64: use --max-new-tokens 6"),
        ((PROMPT, "--temperature", "0"), "--temperature 0 must be above 0.*--no-do-sample"),
        ((PROMPT, "--top-k", "3", "--no-do-sample"), "--top-k has no effect"),
        ((PROMPT, "--repetition-penalty", "-1"), "--repetition-penalty -1"),
        ((PROMPT, "--top-p", "2"), "--top-p"),
        ((PROMPT, "--dtype", "int3"), "--dtype"),
        ((PROMPT, "--file", "x"), "PROMPT and --file"),
        (("--file", "/nowhere/x"), "/nowhere/x: no such file or directory"),
        ((PROMPT, "--chat"), "no chat template: use --no-chat"),
        (("\udcff",), "PROMPT: not UTF-8"),
    ],
)
def test_what_cannot_be_run_is_refused(refused, tiny, args, words):
    import re

    assert re.search(words, refused("run", tiny, *args))


def test_a_wrong_model_is_refused(refused, tmp_path):
    assert "no such directory" in refused("run", tmp_path / "nowhere", "x")
    assert "no config.json" in refused("run", tmp_path, "x")


def test_a_model_without_tokenizer_is_refused(refused, tiny, tmp_path):
    for file in tiny.iterdir():
        if not file.name.startswith("tokenizer"):
            (tmp_path / file.name).symlink_to(file)
    assert "has no tokenizer" in refused("run", tmp_path, "x")


def test_chat_on_a_terminal(tiny_chat):
    """Two turns, a new chat, and the end, typed into a pseudo terminal."""
    ours, theirs = pty.openpty()
    process = start("run", tiny_chat, "--max-new-tokens", "4", "--no-do-sample", stdin=theirs)
    os.write(ours, b"hi\nho\n\nhi\n\x04")
    out, err = process.communicate(timeout=300)
    os.close(theirs)
    os.close(ours)
    assert process.returncode == 0, err
    tokens = [line.split()[0] for line in err.splitlines() if "tokens/s" in line]
    assert len(tokens) == 3
    assert tokens[0] == tokens[2] != tokens[1]
    assert out.count("> ") == 5


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc to see the process wait")
def test_ctrl_c_is_one_line(tiny):
    ours, theirs = pty.openpty()
    process = start("run", tiny, stdin=theirs)
    assert process.stdout.read(2) == "> "
    # Python hears a signal that comes between the prompt and the read only after the read.
    while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "S":
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    os.close(theirs)
    os.close(ours)
    assert process.returncode in INTERRUPTED
    assert (out, err.strip().splitlines()[-1]) == ("", "interrupted")
    assert "Traceback" not in err
