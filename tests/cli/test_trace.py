import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

import moekit.core.trace_files
from moekit.core.load import load
from moekit.core.record import RunRecord
from moekit.core.trace import DECODE, RoutingTrace
from moekit.core.view import MoEView
from tests.interrupts import INTERRUPTED

from .conftest import start

TEXTS = {"de": "der Router wählt zwei Experten. " * 3, "en": "the router chooses two experts"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for domain, text in TEXTS.items():
        (folder / f"{domain}.jsonl").write_text(json.dumps({"text": text}))
    return folder


@pytest.fixture(scope="module")
def loaded(tiny):
    return load(tiny)


def test_trace_is_what_the_seam_saw(moekit, tiny, loaded, data, tmp_path):
    result = moekit("trace", tiny, data, "--out", tmp_path / "t", "--seq-len", 16, "--json").json
    trace = RoutingTrace.open(tmp_path / "t")
    ids = {domain: loaded.tokenizer(text)["input_ids"] for domain, text in TEXTS.items()}
    assert trace.tokens.tolist() == ids["de"] + ids["en"]
    assert result["tokens"] == len(trace)
    assert result["domains"] == trace.domains == ["de", "en"]
    assert max(sample.stop - sample.start for sample in trace.samples) == 16
    record = RunRecord.load(tmp_path / "t")
    assert record.options["seq_len"] == 16
    assert [Path(file.name).name for file in record.inputs] == ["de.jsonl", "en.jsonl"]
    assert record.metrics["layers"] == result["layers"]
    with MoEView(loaded.model).trace() as expected:
        loaded.model(input_ids=torch.tensor([ids["de"][:16]]))
    for position in range(2):
        assert torch.equal(trace.layer(position, 0, 16).topk_ids, expected.layer(position).topk_ids)
        counts = trace.layer(position).topk_ids.flatten().bincount(minlength=4).double()
        assert result["layers"][position]["imbalance"] == pytest.approx(
            (counts.max() / counts.mean()).item()
        )
        assert result["layers"][position]["dead"] == int((counts == 0).sum())


def test_generate_and_logits(moekit, tiny, data, tmp_path):
    args = ("--generate", 4, "--seq-len", 16, "--logits", "--json")
    result = moekit("trace", tiny, data, "-o", tmp_path / "t", *args).json
    trace = RoutingTrace.open(tmp_path / "t")
    # The first generated token comes out of the prefill; the last is never read.
    assert result["decoded"] == int((trace.phase == DECODE).sum()) == 3 * result["sequences"]
    routing = trace.layer(0)
    assert torch.equal(routing.logits.topk(2).indices.sort().values, routing.topk_ids.sort().values)


def test_max_tokens_are_shared_between_domains(moekit, tiny, data, tmp_path):
    args = ("--max-tokens", 10, "--json")
    assert moekit("trace", tiny, data, "-o", tmp_path / "t", *args).json["tokens"] == 10
    samples = RoutingTrace.open(tmp_path / "t").samples
    assert [(sample.domain, sample.stop - sample.start) for sample in samples] == [
        ("de", 5),
        ("en", 5),
    ]


@pytest.mark.parametrize("extra", [(), ("--logits",), ("--generate", 4, "--seq-len", 16)])
def test_dry_run_forecasts_bytes_and_writes_nothing(moekit, tiny, data, tmp_path, extra):
    args = ("trace", tiny, data, "-o", tmp_path / "t", *extra)
    plan = moekit(*args, "--dry-run", "--json").json
    assert list(tmp_path.iterdir()) == []
    assert plan["seconds"] >= 0
    assert moekit(*args, "--json").json["tokens"] == plan["tokens"]
    # Every sequence is in the first batch, so only the file's header is not forecast.
    written = (tmp_path / "t" / "chunk-00000.safetensors").stat().st_size
    assert plan["bytes"] < written < plan["bytes"] + 2000


def test_summary(moekit, tiny, data, tmp_path):
    lines = moekit("trace", tiny, data, "-o", tmp_path / "t").out.splitlines()
    assert "2 sequences in 2 domains, 2 MoE layers" in lines[0]
    assert len(lines) == 4


def test_refusals(refused, tiny, data, tmp_path):
    out = ("-o", tmp_path / "t")
    assert "exists already" in refused("trace", tiny, data, "-o", tmp_path)
    assert "--out" in refused("trace", tiny, data)
    assert "no such file" in refused("trace", tiny, tmp_path / "nowhere", *out)
    assert "use --seq-len 60 or less" in refused(
        "trace", tiny, data, *out, "--seq-len", 61, "--generate", 4
    )
    (tmp_path / "file").touch()
    assert "is not a directory" in refused("trace", tiny, data, "-o", tmp_path / "file" / "t")
    assert "--generate 64 leaves no room" in refused("trace", tiny, data, *out, "--generate", 64)
    assert not (tmp_path / "t").exists()


def test_a_full_disk_leaves_nothing_that_looks_finished(refused, tiny, data, tmp_path, monkeypatch):
    def full(tensors, path):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(moekit.core.trace_files, "save_file", full)
    assert "No space left" in refused("trace", tiny, data, "-o", tmp_path / "t")
    assert not (tmp_path / "t").exists()


HANG_WHILE_WRITING = """
import pathlib, sys, time
import moekit.core.trace_files as files
from moekit.cli.main import entry

def hang(tensors, path):
    pathlib.Path(path).write_bytes(b"half a chunk")
    time.sleep(600)

files.save_file = hang
entry(sys.argv[1:])
"""


def test_ctrl_c_while_writing_leaves_nothing_that_looks_finished(tiny, data, tmp_path):
    """Interrupted with half a chunk written; a second run succeeds."""
    out = tmp_path / "t"
    arguments = ["trace", str(tiny), str(data), "-o", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-c", HANG_WHILE_WRITING, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not list(tmp_path.glob("t.partial/chunk-*")) and process.poll() is None:
        time.sleep(0.05)
    time.sleep(0.2)  # from the end of the write into the sleep
    process.send_signal(signal.SIGINT)
    printed, err = process.communicate(timeout=300)
    assert process.returncode in INTERRUPTED, err
    assert printed == ""
    assert err.strip().startswith("interrupted: ")
    assert len(err.strip().splitlines()) == 1
    assert not out.exists()
    again = start(*arguments, "--json")
    printed, err = again.communicate(timeout=300)
    assert again.returncode == 0, err
    assert json.loads(printed)["tokens"] == len(RoutingTrace.open(out)) > 0
