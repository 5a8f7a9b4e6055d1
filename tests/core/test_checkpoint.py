"""The lazy reader: what it reads, and what it refuses before reading."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from moekit.core.checkpoint import Checkpoint, read_header
from moekit.core.errors import UserError


def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "bank": torch.randn(5, 4, 6, generator=generator).bfloat16(),
        "row": torch.randn(7, generator=generator),
        "scalar": torch.tensor(3.5),
        "ids": torch.arange(12).reshape(3, 4),
        "flag": torch.tensor([True, False, True]),
        "fp8": torch.randn(4, 4, generator=generator).to(torch.float8_e4m3fn),
        "empty": torch.zeros(0, 3),
    }


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.float(), b.float())


def write_raw(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def sharded(directory, parts):
    directory.mkdir(exist_ok=True)
    weight_map = {}
    for number, part in enumerate(parts):
        file = f"model-{number}.safetensors"
        save_file(part, directory / file)
        weight_map |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def test_single_file_and_directory(tmp_path):
    expected = tensors()
    save_file(expected, tmp_path / "model.safetensors")
    for path in (tmp_path, tmp_path / "model.safetensors", str(tmp_path)):
        with Checkpoint(path) as checkpoint:
            assert sorted(checkpoint.names()) == sorted(expected)
            assert all(same(checkpoint.get(name), expected[name]) for name in expected)
            assert checkpoint.nbytes == sum(t.nbytes for t in expected.values())
            assert checkpoint.shape("bank") == (5, 4, 6)
            assert checkpoint.dtype("bank") == torch.bfloat16
            assert "bank" in checkpoint
            assert len(checkpoint) == len(expected)


def test_shards_with_an_index(tmp_path):
    expected = tensors()
    names = sorted(expected)
    parts = [{n: expected[n] for n in names[i::3]} for i in range(3)]
    checkpoint = Checkpoint(sharded(tmp_path, parts))
    assert [file.name for file in checkpoint.files] == [f"model-{i}.safetensors" for i in range(3)]
    assert all(same(checkpoint.get(name), expected[name]) for name in expected)


def test_reading_again_after_close(tmp_path):
    save_file(tensors(), tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    first = checkpoint.get("row")
    checkpoint.close()
    assert torch.equal(checkpoint.get("row"), first)


@pytest.mark.parametrize(
    "key", [0, 4, -1, slice(1, 3), slice(None), slice(0, 5, 2), slice(3, 1), (2, slice(1, 3)),
            (slice(1, 4), 0), (slice(1, 4), slice(None), slice(2, 5)), (torch.tensor([3, 1]),)]
)  # fmt: skip
def test_slices_equal_indexing_the_whole(tmp_path, key):
    bank = tensors()["bank"]
    save_file({"bank": bank}, tmp_path / "model.safetensors")
    piece = Checkpoint(tmp_path).get_slice("bank")
    assert piece.shape == bank.shape
    assert torch.equal(piece[key], bank[key])


def test_a_slice_reads_only_its_bytes(tmp_path, monkeypatch):
    save_file({"bank": tensors()["bank"]}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    read = []
    original = checkpoint._read

    def spy(name, start, stop):
        read.append((start, stop))
        return original(name, start, stop)

    monkeypatch.setattr(checkpoint, "_read", spy)
    checkpoint.get_slice("bank")[3]
    assert read == [(3 * 48, 4 * 48)]


@pytest.mark.parametrize(
    "region",
    [
        ((0, 5), (0, 4), (0, 6)),
        ((2, 3), (1, 3), (0, 6)),
        ((2, 3), (1, 2), (2, 5)),
        ((1, 4), (1, 2), (0, 6)),
        ((2, 2), (0, 4), (0, 6)),
        ((4, 5), (3, 4), (5, 6)),
    ],
)
def test_blocks(tmp_path, region):
    bank = tensors()["bank"]
    save_file({"bank": bank}, tmp_path / "model.safetensors")
    block = Checkpoint(tmp_path).get_block("bank", region)
    assert torch.equal(block, bank[tuple(slice(*pair) for pair in region)])


def test_half_an_expert_reads_half_its_bytes(tmp_path, monkeypatch):
    save_file({"bank": tensors()["bank"]}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    read = []
    original = checkpoint._read
    monkeypatch.setattr(checkpoint, "_read", lambda *a: (read.append(a[1:]), original(*a))[1])
    checkpoint.get_block("bank", ((3, 4), (2, 4), (0, 6)))
    assert read == [(3 * 48 + 24, 4 * 48)]


@pytest.mark.parametrize("key", [5, -6])
def test_slice_out_of_range(tmp_path, key):
    save_file({"bank": tensors()["bank"]}, tmp_path / "model.safetensors")
    with pytest.raises(IndexError, match="of 5"):
        Checkpoint(tmp_path).get_slice("bank")[key]


def test_rows_out_of_range(tmp_path):
    save_file({"bank": tensors()["bank"], "scalar": torch.tensor(1.0)}, tmp_path / "a.safetensors")
    checkpoint = Checkpoint(tmp_path / "a.safetensors")
    for name, start, stop in [("bank", 3, 6), ("bank", -1, 2), ("bank", 3, 2), ("scalar", 0, 1)]:
        with pytest.raises(IndexError):
            checkpoint.get_rows(name, start, stop)


def test_missing_tensor(tmp_path):
    save_file(tensors(), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="no tensor 'nope'"):
        Checkpoint(tmp_path).get("nope")


def test_missing_directory(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        Checkpoint(tmp_path / "nowhere")


def test_directory_without_a_model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="has no model"):
        Checkpoint(tmp_path)


def test_pickles_are_never_read(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    with pytest.raises(UserError, match=r"pickled weights \(pytorch_model\.bin\)"):
        Checkpoint(tmp_path)


def test_truncated_shard_names_file_and_bytes(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(tensors(), path)
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size - 10)
    with pytest.raises(UserError) as caught:
        Checkpoint(tmp_path)
    message = str(caught.value)
    assert str(path) in message
    assert f"describes {size} bytes" in message
    assert f"has {size - 10}" in message


def test_file_that_shrinks_while_open(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(1000)}, path)
    checkpoint = Checkpoint(tmp_path)
    with path.open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(UserError, match="became shorter"):
        checkpoint.get("a")


@pytest.mark.parametrize("content", [b"", b"\x05\0\0", struct.pack("<Q", 10**6) + b"{}"])
def test_too_short_for_a_header(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"has {len(content)} bytes"):
        Checkpoint(tmp_path)


def test_header_over_the_limit(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    write_raw(path, {})
    monkeypatch.setattr("moekit.core.checkpoint.MAX_HEADER_BYTES", 1)
    with pytest.raises(UserError, match="limit of 1"):
        read_header(path)


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"not json", b"", "cannot be read"),
        (b"[" * 100_000, b"", "cannot be read"),
        (b"[]", b"", "no JSON object"),
        (b'{"a": {}, "a": {}}', b"", "occurs twice"),
        ({"a": 1}, b"", "needs dtype, shape and data_offsets"),
        ({"a": {"dtype": "F32", "shape": [2]}}, b"", "needs dtype, shape and data_offsets"),
        ({"a": entry(dtype="F33")}, bytes(8), "unknown dtype 'F33'"),
        ({"a": entry(shape=(-2,))}, bytes(8), r"shape \[-2\]"),
        ({"a": entry(shape=(True,))}, bytes(8), r"shape \[True\]"),
        ({"a": {**entry(), "shape": "2"}}, bytes(8), "shape '2'"),
        ({"a": entry(offsets=(0, 8, 9))}, bytes(8), "data_offsets"),
        ({"a": entry(offsets=(8, 0))}, bytes(8), "-8 bytes for shape"),
        ({"a": entry(offsets=(0, 4))}, bytes(4), "4 bytes for shape .* expected 8"),
        ({"a": entry(dtype="F4", shape=(3,), offsets=(0, 2))}, bytes(2), "expected 1.5"),
        ({"a": entry(offsets=(2**62, 2**62 + 8))}, bytes(8), "is truncated"),
        ({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12), "'a' and 'b' overlap"),
        ({"a": entry(), "b": entry()}, bytes(8), "overlap"),
        ({"a": entry()}, bytes(9), "the shard is damaged"),
    ],
)
def test_damaged_headers(tmp_path, header, data, message):
    path = tmp_path / "model.safetensors"
    write_raw(path, header, data)
    with pytest.raises(UserError, match=message) as caught:
        Checkpoint(tmp_path)
    assert str(path) in str(caught.value)


def test_dtype_that_torch_lacks_is_listed_but_not_read(tmp_path):
    path = tmp_path / "model.safetensors"
    write_raw(path, {"a": entry("F4", (4,), (0, 2))}, bytes(2))
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.names() == ["a"]
    assert checkpoint.nbytes == 2
    with pytest.raises(UserError, match="dtype F4"):
        checkpoint.get("a")


def edit_index(directory, **weight_map):
    path = directory / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    content["weight_map"] |= weight_map
    path.write_text(json.dumps(content))


def test_index_naming_a_missing_shard(tmp_path):
    sharded(tmp_path, [{"a": torch.ones(2)}, {"b": torch.ones(2)}])
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(UserError, match=r"2 shards and 1 is missing: model-1\.safetensors"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    "file", ["../evil.safetensors", "/etc/evil.safetensors", "sub/a.safetensors", "a.bin", 3, ""]
)
def test_index_pointing_elsewhere(tmp_path, file):
    sharded(tmp_path / "model", [{"a": torch.ones(2)}])
    save_file({"x": torch.ones(2)}, tmp_path / "evil.safetensors")
    edit_index(tmp_path / "model", x=file)
    with pytest.raises(UserError, match="only names of"):
        Checkpoint(tmp_path / "model")


def test_index_placing_a_tensor_in_a_shard_that_lacks_it(tmp_path):
    sharded(tmp_path, [{"a": torch.ones(2)}])
    edit_index(tmp_path, ghost="model-0.safetensors")
    with pytest.raises(UserError, match="which lacks it"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": [1]}'])
def test_damaged_index(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match=r"weight_map|JSON"):
        Checkpoint(tmp_path)
