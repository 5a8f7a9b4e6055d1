"""moekit run on a GPU: refused without one, and with one in its place the same text."""

import pytest
import torch

from moekit.core.pack import pack
from tests.runtime.device.fake_device import FakeDevice

PROMPT = "der Router"
GREEDY = ("--no-do-sample", "--max-new-tokens", "2")


@pytest.fixture(scope="module")
def packed(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "packed"
    pack(tiny, out, codec="fp32")
    return out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(refused, packed):
    message = refused("run", packed, PROMPT, "--device", "cuda", "--gpu-memory", "8GiB")
    assert "--device cuda: this torch sees no GPU" in message


def test_options_that_need_a_gpu(refused, packed):
    assert "gpu_memory needs a GPU" in refused("run", packed, PROMPT, "--gpu-memory", "1GB")
    assert "scheduler needs a GPU" in refused("run", packed, PROMPT, "--scheduler", "hybrimoe")
    assert "none of cpu, cuda" in refused("run", packed, PROMPT, "--device", "gpu")
    assert "leave out --device" in refused("run", packed, "--device", "cuda", "--dry-run")


def test_two_tables_and_the_text_of_the_processor(moekit, packed, monkeypatch):
    pytest.importorskip("triton")
    for where in ("moekit.runtime.open.open_device", "moekit.runtime.open_packed.open_device"):
        monkeypatch.setattr(where, lambda name: FakeDevice(immediate=True))
    plain = moekit("run", packed, PROMPT, *GREEDY).out
    options = ("--device", "cuda", "--gpu-memory", "1GiB", "--memory", "3GB")
    done = moekit("run", packed, PROMPT, *options, "--max-context", "32", *GREEDY)
    assert done.code == 0, done.err
    assert done.out == plain
    assert "GPU context" in done.err
    assert "[GPU: " in done.err
    assert "[forecast" not in done.err
    as_json = moekit("run", packed, PROMPT, *options, "--max-context", "32", "--json", *GREEDY)
    gpu = as_json.json["engine"]["gpu_memory"]
    assert gpu["limit"] == 2**30
    assert as_json.json["engine"]["bytes_copied"] == gpu["all_experts"]


def test_a_device_needs_triton(monkeypatch, refused, packed):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr("moekit.ops.triton.available", lambda: False)
    message = refused("run", packed, PROMPT, "--device", "cuda:0")
    assert "needs Triton: pip install 'moekit[gpu]'" in message
    assert "sees 1 GPUs" in refused("run", packed, PROMPT, "--device", "cuda:3")
