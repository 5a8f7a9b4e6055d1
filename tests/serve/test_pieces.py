import itertools
import random

import pytest

from moekit.runtime.detokenize import IncrementalDecoder, decode
from moekit.runtime.sampling import TokenLogprobs
from moekit.serve.logprobs import LOWEST, CompletionLogprobs, TokenNames, chat_logprobs
from moekit.serve.pieces import PieceStream
from moekit.serve.stop_strings import StopStrings
from tests.models import tiny_tokenizer

TEXT = "zwei Experten für 日本語の🤖 token.\n\nUser: ende"


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def divisions(text: str, count: int = 60):
    """The text in one piece, in single characters, and cut at random places."""
    yield [text]
    yield list(text)
    rng = random.Random(0)
    for _ in range(count):
        cuts = sorted(rng.sample(range(1, len(text)), rng.randint(1, len(text) - 1)))
        yield [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]


@pytest.mark.parametrize(
    ("stops", "text", "shown"),
    [
        (["\n\nUser:"], "an answer\n\nUser: more", "an answer"),
        (["\n\nUser:"], "an answer\n\nUses", "an answer\n\nUses"),
        (["aab"], "aaab", "a"),
        (["abab", "c"], "xababc", "x"),
        (["abcd", "bc"], "abcd", "a"),  # the one that is complete first
        (["bcd", "abcd"], "abcd", ""),  # both at once: the longer
        (["x"], "xyz", ""),
        ([], "anything", "anything"),
        (["日本"], "für 日本語", "für "),
    ],
)
def test_stop_strings_for_any_division_of_the_text(stops, text, shown):
    for pieces in divisions(text):
        strings = StopStrings(stops)
        out = ""
        for piece in pieces:
            out += strings.add(piece)
            assert shown.startswith(out)  # nothing that has to be taken back
        assert out + strings.end() == shown
        assert strings.stopped == any(stop in text for stop in stops)


def test_only_what_may_become_a_stop_string_is_held_back():
    strings = StopStrings(["END"])
    assert strings.add("some") == "some"
    assert strings.add("thing E") == "thing "
    assert strings.add("N") == ""
    assert strings.add("T E") == "ENT "


def test_a_character_waits_for_its_last_token(tokenizer):
    ids = tokenizer(TEXT)["input_ids"]
    assert any("\ufffd" in decode(tokenizer, [token]) for token in ids)
    decoder = IncrementalDecoder(tokenizer)
    pieces = [decoder.add([token]) for token in ids]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) + decoder.end() == TEXT
    assert "" in pieces


def test_text_that_continues_a_prompt(tokenizer):
    ids = tokenizer(TEXT)["input_ids"]
    for cut in range(1, len(ids)):
        before, after = ids[:cut], ids[cut:]
        decoder = IncrementalDecoder(tokenizer, before[-8:])
        text = "".join(decoder.add([token]) for token in after) + decoder.end()
        begun = decode(tokenizer, before)
        if begun.endswith("\ufffd"):
            # The prompt ends within a character; the rest of it has to stand for something.
            assert TEXT.endswith(text.lstrip("\ufffd"))
        else:
            assert begun + text == TEXT


def test_half_a_character_at_the_end_is_shown_as_such(tokenizer):
    ids = tokenizer("a日")["input_ids"][:-1]
    stream = PieceStream(tokenizer, [])
    shown = "".join(stream.add(token, None).text for token in ids)
    assert (shown, stream.end().text) == ("a", "\ufffd")


def logprobs_of(token: int) -> TokenLogprobs:
    return TokenLogprobs(token, -0.5, [(token, -0.5), (0, -1.0)])


@pytest.mark.parametrize("stop", ["日本", "本", "\n\nUser:", "f", "ende", "r d"])
def test_nothing_of_a_stop_string_leaks(tokenizer, stop):
    ids = tokenizer(TEXT)["input_ids"]
    stream = PieceStream(tokenizer, [stop])
    text, tokens = "", []
    for token in ids:
        piece = stream.add(token, logprobs_of(token))
        text += piece.text
        tokens += [found.token for found in piece.logprobs]
        if stream.stopped:
            break
    piece = stream.end()
    assert not stream.stopped or not piece
    text += piece.text
    tokens += [found.token for found in piece.logprobs]
    assert text == TEXT.partition(stop)[0]
    # Tokens up to the one that the text ends in, and none that is only of the stop string.
    assert tokens == ids[: len(tokens)]
    assert decode(tokenizer, tokens).startswith(text)
    assert not tokens or not decode(tokenizer, tokens[:-1]).startswith(text + stop[:1])


def test_logprobs_leave_with_their_text(tokenizer):
    ids = tokenizer("für 日本語")["input_ids"]
    stream = PieceStream(tokenizer, ["never"])
    offset = 0
    for token in ids:
        piece = stream.add(token, logprobs_of(token))
        found = [entry.token for entry in piece.logprobs]
        assert found == ids[offset : offset + len(found)]
        assert bool(piece.text) == bool(found)
        offset += len(found)
        assert decode(tokenizer, ids[:offset]).endswith(piece.text)
    assert offset == len(ids)


def test_names_of_tokens_are_their_bytes(tokenizer):
    names = TokenNames(tokenizer)
    ids = tokenizer(TEXT)["input_ids"]
    assert b"".join(names.bytes_of(token) for token in ids) == TEXT.encode()
    end = tokenizer.eos_token_id
    assert (names.text(end), names.bytes_of(10**6)) == ("<|end|>", b"")
    half = next(token for token in ids if names.text(token) == "\ufffd")
    assert names.key(half).startswith("bytes:\\x")


def test_names_of_sentencepiece_tokens():
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<s>": 0, "▁a": 1, "b▁c": 2, "<0xE6>": 3, "▁": 4}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<s>"))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    names = TokenNames(PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>"))
    assert [names.bytes_of(i) for i in range(5)] == [b"<s>", b" a", b"b c", b"\xe6", b" "]


def test_shapes_of_the_two_apis(tokenizer):
    names = TokenNames(tokenizer)
    ids = tokenizer("a日b")["input_ids"]
    found = [TokenLogprobs(token, -1.0, [(token, -1.0)]) for token in ids]
    found[-1] = TokenLogprobs(ids[-1], float("-inf"), [])
    content = chat_logprobs(names, found)["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in content).decode() == "a日b"
    assert content[-1]["logprob"] == LOWEST
    assert content[0]["top_logprobs"] == [{"token": "a", "logprob": -1.0, "bytes": [97]}]
    writer = CompletionLogprobs(names)
    parts = [writer.of(found[:2], first=ids[0]), writer.of(found[2:])]
    assert parts[0]["token_logprobs"] == [None, -1.0, -1.0]
    assert parts[0]["top_logprobs"][0] is None
    assert parts[-1]["text_offset"][-1] == len("aa日")  # the first token stood twice here
