"""Run records: what they hold, that they load again, and how files are hashed."""

import dataclasses
import hashlib
import json
import sys
import time

import pytest

from moekit.core import record as record_module
from moekit.core.errors import UserError
from moekit.core.record import FileHash, RunRecord, hash_files, start_record


@pytest.fixture
def files(tmp_path):
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "b.json").write_text("{}")
    (directory / "a.txt").write_text("hello")
    (directory / "nested").mkdir()
    return directory


def test_record_round_trip(tmp_path, files):
    started = start_record(
        "convert", {"to": "fused", "model": files, "n": 3}, seed=7, inputs=[files]
    )
    time.sleep(0.02)
    started.finish({"bytes": 12}, artefacts=[files / "a.txt"])
    started.finish({"more": 1})
    path = started.save(tmp_path)
    assert path == tmp_path / "record.json"
    for source in (path, tmp_path):
        assert RunRecord.load(source) == started
    assert started.options == {"to": "fused", "model": str(files), "n": 3}
    assert started.seed == 7
    assert 0.02 <= started.seconds < 10
    assert started.started.endswith("+00:00")
    assert started.metrics == {"bytes": 12, "more": 1}
    assert [item.name for item in started.inputs] == [str(files / n) for n in ("a.txt", "b.json")]
    assert started.artefacts == [FileHash.of(files / "a.txt")]
    assert started.versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert set(started.versions) >= {"moekit", "torch", "transformers"}
    assert started.hardware["cores"] >= 1
    assert started.hardware["memory"] > 2**28
    assert started.hardware["cpu"]
    content = json.loads(path.read_text())
    assert content["version"] == 1
    assert "_start" not in content


def test_small_files_are_hashed_whole(files):
    found = hash_files([files / "a.txt"])[0]
    digest = hashlib.sha256(b"hello").hexdigest()
    assert found == FileHash(str(files / "a.txt"), 5, digest, False)


def test_large_files_are_sampled(tmp_path, monkeypatch):
    monkeypatch.setattr(record_module, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(record_module, "SAMPLE_BYTES", 10)
    path = tmp_path / "large"
    content = bytes(range(256)) * 8
    path.write_bytes(content)
    whole = FileHash.of(path, "large")
    assert (whole.name, whole.bytes, whole.sampled) == ("large", 2048, True)

    def changed(position, data):
        new = content[:position] + data + content[position + len(data) :]
        path.write_bytes(new)
        return FileHash.of(path, "large") != whole

    assert changed(0, b"\xff")
    assert changed(2047, b"\x00")
    assert changed((2048 - 10) * 7 // 15, b"\xee")
    assert not changed(20, b"\xff")  # between two samples: what sampling gives up
    path.write_bytes(content[:-1])
    assert FileHash.of(path, "large") != whole


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "is no run record"),
        ("{}", "is no run record"),
        ("version 2", "has version 2; this moekit reads version 1"),
        ("bad input", "is no run record"),
    ],
)
def test_bad_records(tmp_path, content, message):
    good = json.loads(start_record("x").to_json())
    if content == "version 2":
        content = json.dumps(good | {"version": 2})
    if content == "bad input":
        content = json.dumps(good | {"inputs": [{"nam": 1}]})
    (tmp_path / "record.json").write_text(content)
    with pytest.raises(UserError, match=message):
        RunRecord.load(tmp_path)


def test_missing_record(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        RunRecord.load(tmp_path / "none.json")


def test_time_is_no_part_of_equality():
    one = start_record("x")
    assert dataclasses.replace(one) == one
