"""ExpertStore: exact accounting, and an error instead of a wrong tensor for every fault."""

import errno
import json
import os
import shutil
import threading

import pytest
import torch

from moekit.core.errors import UserError
from moekit.core.pack import pack
from moekit.runtime import store as store_module
from moekit.runtime.pages import page_aligned
from moekit.runtime.store import ExpertStore, StoreError
from tests.core.test_pack import saved, wide


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    root = tmp_path_factory.mktemp("store")
    pack(saved(wide(), root / "m"), root / "packed", codec="nested4")
    return root / "packed"


@pytest.fixture
def copy(packed, tmp_path):
    return shutil.copytree(packed, tmp_path / "copy")


def flip(path, offset):
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def values(parts):
    return [parts.codec.decode(m) for m in parts.matrices.values()] + list(parts.vectors.values())


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(values(a), values(b), strict=True))


def place(store, layer, expert, plane=0):
    record = store._records[store.layers[layer].tensor_name(expert, plane)]
    return store.path / record.file, record.offset, record.size


@pytest.mark.parametrize("direct", [True, False])
def test_reads_are_counted_to_the_byte(packed, direct):
    with ExpertStore.open(packed, direct=direct) as store:
        assert store.stats.bytes == 0
        total = 0
        for layer, described in enumerate(store.layers):
            for e in range(described.num_experts):
                store.read(layer, e)
                total += store.nbytes(layer, e)
        assert store.stats.bytes == total == store.expert_bytes
        experts = sum(described.num_experts for described in store.layers)
        # Planes that lie one after the other are one read.
        assert (store.stats.experts, store.stats.reads) == (experts, experts)


def test_damage_after_a_good_read_is_found(packed):
    with ExpertStore.open(packed) as store:
        store.read(0, 1)
        path, offset, size = place(store, 0, 1)
        with path.open("r+b") as file:
            file.seek(offset + size // 2)
            byte = file.read(1)
            file.seek(offset + size // 2)
            file.write(bytes([byte[0] ^ 1]))
        try:
            with pytest.raises(StoreError, match="checksum"):
                store.read(0, 1)
        finally:
            with path.open("r+b") as file:
                file.seek(offset + size // 2)
                file.write(byte)
        store.read(0, 1)


def test_planes(packed):
    with ExpertStore.open(packed) as store:
        whole = store.read(1, 3)
        for planes in (1, 2, 3):
            before = store.stats.bytes
            part = store.read(1, 3, planes)
            assert store.stats.bytes - before == store.nbytes(1, 3, planes)
            for name, encoded in part.matrices.items():
                expected = whole.codec.decode(whole.matrices[name].prefix(planes))
                assert torch.equal(part.codec.decode(encoded), expected)
        for bad in ((0, 8), (9, 0), (-1, 0), (0, -1)):
            with pytest.raises(IndexError):
                store.read(*bad)
        with pytest.raises(IndexError, match="4 of 3 planes"):
            store.read(0, 0, 4)


def test_reading_into_a_buffer(packed):
    with ExpertStore.open(packed) as store:
        buffer = page_aligned(store.nbytes(0, 0))
        first = store.read_into(buffer, 0, 0)
        kept = [v.clone() for v in values(first)]
        assert equal(first, store.read(0, 0))
        store.read_into(buffer, 0, 1)
        assert not torch.equal(values(first)[0], kept[0])
        with pytest.raises(ValueError, match="does not fit"):
            store.read_into(buffer[:-1], 0, 0)


def test_direct_reads_fall_back(packed, monkeypatch):
    with ExpertStore.open(packed) as store:
        expected = store.read(0, 0)
    real = os.open

    def refuses(path, flags, *rest):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuses)
    with ExpertStore.open(packed) as store:
        assert store.direct
        assert equal(store.read(0, 0), expected)
        assert not store.direct


def test_many_threads(packed):
    with ExpertStore.open(packed) as store:
        expected = [store.read(0, e) for e in range(8)]
        wrong = []

        def work(start):
            for i in range(16):
                e = (start + i) % 8
                if not equal(store.read(0, e), expected[e]):
                    wrong.append(e)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert store.stats.experts == 8 + 64


@pytest.mark.parametrize("where", ["magic", "crc", "id", "data", "last", "padding"])
def test_a_flipped_byte(copy, where):
    with ExpertStore.open(copy) as store:
        file, offset, size = place(store, 1, 2)
        used = store.layers[1].record(2, 0).used
    at = {"magic": 0, "crc": 21, "id": 33, "data": 200, "last": used - 1, "padding": size - 1}
    flip(file, offset + at[where])
    with ExpertStore.open(copy) as store:
        store.read(1, 1)
        for _ in range(2):
            with pytest.raises(StoreError, match=r"expert 2 of layer 1 \(plane 0.* is damaged"):
                store.read(1, 2)
        store.read(1, 3)


def test_a_flipped_byte_in_the_resident_part(copy):
    file = copy / "resident.safetensors"
    flip(file, file.stat().st_size - 5)
    with ExpertStore.open(copy) as store, pytest.raises(StoreError, match="is damaged: its check"):
        list(store.resident())


def test_the_resident_part_is_read_directly_too(packed):
    with ExpertStore.open(packed) as store:
        store.read(0, 0)
        can = store.direct
        dict(store.resident())
        assert store.direct == can


def test_experts_that_changed_places(copy):
    with ExpertStore.open(copy) as store:
        file, one, size = place(store, 0, 1)
        _, two, _ = place(store, 0, 2)
    data = bytearray(file.read_bytes())
    data[one : one + size], data[two : two + size] = data[two : two + size], data[one : one + size]
    file.write_bytes(data)
    with ExpertStore.open(copy) as store, pytest.raises(StoreError, match="plane 0 of expert 2 of"):
        store.read(0, 1)


def test_files_of_another_model(copy, tmp_path):
    pack(saved(wide(), tmp_path / "m"), tmp_path / "other", codec="nested4")
    shutil.copy(tmp_path / "other" / "experts.safetensors", copy)
    with ExpertStore.open(copy) as store, pytest.raises(StoreError, match="another packed model"):
        store.read(0, 0)


@pytest.mark.parametrize("name", ["experts.safetensors", "resident.safetensors"])
def test_truncated_and_missing_files(copy, name):
    file = copy / name
    size = file.stat().st_size
    os.truncate(file, size - 1)
    with pytest.raises(StoreError, match=rf"{name} is truncated: .* {size} bytes"):
        ExpertStore.open(copy)
    file.unlink()
    with pytest.raises(StoreError, match=f"{name} is missing"):
        ExpertStore.open(copy)


@pytest.mark.parametrize("direct", [True, False])
def test_a_file_that_shrinks_while_it_is_open(copy, direct):
    with ExpertStore.open(copy, direct=direct) as store:
        file, offset, _ = place(store, 2, 7)
        store.read(2, 7)
        os.truncate(file, offset + 5000)
        with pytest.raises(StoreError, match=r"became shorter|is damaged"):
            store.read(2, 7)


def test_a_file_that_vanishes_before_its_first_read(copy):
    with ExpertStore.open(copy) as store:
        (copy / "experts.safetensors").unlink()
        with pytest.raises(StoreError, match="cannot be read: No such file"):
            store.read(0, 0)


def test_a_read_error_in_the_middle(packed, monkeypatch):
    real, calls = os.preadv, []

    def fails(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*arguments)

    with ExpertStore.open(packed) as store:
        expected = [store.read(0, e) for e in range(3)]
        monkeypatch.setattr(store_module.os, "preadv", fails)
        assert equal(store.read(0, 0), expected[0])
        assert equal(store.read(0, 1), expected[1])
        with pytest.raises(StoreError, match="Input/output error"):
            store.read(0, 2)
        # The disk has recovered.
        assert equal(store.read(0, 2), expected[2])


def test_short_reads_are_continued(packed, monkeypatch):
    real = os.preadv
    with ExpertStore.open(packed) as store:
        expected = store.read(0, 0)
        monkeypatch.setattr(
            store_module.os, "preadv", lambda fd, buffers, at: real(fd, [buffers[0][:4096]], at)
        )
        assert equal(store.read(0, 0), expected)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("version", 1, "version 1; this moekit reads versions 2 to 4. Convert the model again"),
        ("tile", 8, "is damaged: .*tile 8"),
        ("format", "other", "no header of a packed model"),
        ("id", "0" * 31, "is damaged"),
        ("layers", [{}], "is damaged"),
        ("layers", None, "is damaged"),
        ("expert_files", ["../experts.safetensors"], "is damaged: .*file name"),
        ("expert_files", [], "is in no file of experts|is in only one"),
        ("resident", {}, "is in only one of the header and the files"),
        ("resident", {"x": "0"}, "x is in only one of the header and the files"),
    ],
)
def test_damaged_headers(copy, key, value, message):
    header = copy / "packed.json"
    content = json.loads(header.read_text())
    header.write_text(json.dumps(content | {key: value}))
    with pytest.raises(UserError, match=message):
        ExpertStore.open(copy)


def test_headers_that_do_not_fit_the_files(copy):
    header = copy / "packed.json"
    original = json.loads(header.read_text())

    def refused(change, message):
        content = json.loads(json.dumps(original))
        change(content["layers"][0])
        header.write_text(json.dumps(content))
        with pytest.raises(UserError, match=message):
            ExpertStore.open(copy)

    refused(lambda layer: layer["codecs"][0].update(name="int9"), "no codec method is named")
    refused(lambda layer: layer["codecs"][0].update(group_size=48), "group size 48")
    refused(lambda layer: layer["codecs"][0].update(name="bf16"), "bytes at .* expected")
    refused(lambda layer: layer["matrices"].update(up=[64, -1]), "is damaged")
    refused(lambda layer: layer["matrices"].update(up=[64, 33]), "33 columns")
    refused(lambda layer: layer["codec_of_expert"].append(0), "is in no file of experts")
    refused(lambda layer: layer["codec_of_expert"].append(7), "is damaged")


def test_no_packed_model(tmp_path):
    with pytest.raises(UserError, match=r"is no packed model: it has no packed\.json"):
        ExpertStore.open(tmp_path)
