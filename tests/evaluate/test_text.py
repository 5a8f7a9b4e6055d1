import io
import json

import pytest

from moekit.core.errors import UserError
from moekit.evaluate.text import Sample, read_texts, shuffled


def test_reads_jsonl_text_and_directories(tmp_path):
    lines = [{"text": "line\u2028one"}, {"text": "zwei", "other": 1}, {"text": ""}]
    raw = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n"
    (tmp_path / "web-fr.valid.jsonl").write_text(raw, encoding="utf-8")
    (tmp_path / "captions.cs").write_text("ahoj\nsvěte\n", encoding="utf-8")
    assert read_texts(tmp_path) == [
        Sample("ahoj\nsvěte\n", "captions"),
        Sample("line\u2028one", "web-fr"),
        Sample("zwei", "web-fr"),
    ]
    assert len(read_texts([tmp_path / "captions.cs", tmp_path])) == 4


def test_reads_standard_input(monkeypatch):
    stdin = io.TextIOWrapper(io.BytesIO("héllo".encode()))
    monkeypatch.setattr("sys.stdin", stdin)
    assert read_texts("-") == [Sample("héllo", "stdin")]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"text": "ok"}\n{"text": \n', "a.jsonl:2: not valid JSON"),
        ("a.jsonl", b'{"txt": "ok"}\n', 'a.jsonl:1: expected .* "text"'),
        ("a.jsonl", b"[1]\n", "a.jsonl:1: expected"),
        ("a.txt", b"ok \xff", "not UTF-8 text .byte 3 is 0xff"),
        ("a.txt", b"", "no text found"),
    ],
)
def test_bad_text_is_named(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        read_texts(tmp_path / name)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.jsonl: no such file"):
        read_texts(tmp_path / "nowhere.jsonl")


def test_shuffling_is_by_seed_and_domain():
    samples = [Sample(str(n), domain) for domain in "ab" for n in range(20)]
    first = shuffled(samples, 1)
    assert first == shuffled(samples, 1)
    assert sorted(first, key=str) == sorted(samples, key=str)
    assert first != samples
    assert first != shuffled(samples, 2)
    # The other domain's documents change nothing.
    assert [s for s in first if s.domain == "b"] == shuffled(samples[20:], 1)
