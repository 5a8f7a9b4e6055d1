"""Tensors in their order whatever thread read them, in bounded memory, and no thread left over."""

import threading

import numpy as np
import pytest
import torch

from moekit.runtime import resident_reader
from moekit.runtime.resident_reader import ResidentReader, Span

PAGE = 4096


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(resident_reader, "PIECE_BYTES", 2 * PAGE)
    monkeypatch.setattr(resident_reader, "AHEAD_BYTES", 8 * PAGE)


class Files:
    """Two files of random bytes, and what was read of them."""

    def __init__(self):
        random = np.random.default_rng(0)
        self.data = {name: random.integers(0, 256, 100_000, dtype=np.uint8) for name in "ab"}
        self.reads = []

    def read(self, file, offset, into, needed):
        assert offset % PAGE == 0
        assert into.data_ptr() % PAGE == 0
        self.reads.append((file, offset))
        part = torch.from_numpy(self.data[file][offset : offset + len(into)])
        assert offset + len(part) >= min(needed, offset + len(into))
        into[: len(part)] = part


def spans():
    """Neighbours that share a page, one that is several pieces long, one without bytes, and the
    last bytes of a file."""
    ends = (100, 300, 5000, 60_000, 60_000, 90_000, 100_000)
    return [
        Span(f"{file}{start}-{stop}", file, start, stop)
        for file in "ab"
        for start, stop in zip((7, *ends), ends, strict=False)
    ]


def threads():
    return [t for t in threading.enumerate() if t.name.startswith("resident-reader")]


@pytest.mark.parametrize("whole", [False, True])
def test_every_tensor_in_its_order(whole):
    files = Files()
    found = list(ResidentReader(spans(), files.read, whole=whole))
    assert [span for span, _ in found] == spans()
    for span, data in found:
        assert np.array_equal(data.numpy(), files.data[span.file][span.start : span.stop])
    full = [data.untyped_storage().data_ptr() for _, data in found if len(data)]
    assert len(set(full)) == (1 if whole else len(full))
    assert not threads()


def test_what_is_left_out_takes_no_memory():
    files = Files()
    some = [span for span in spans() if span.stop - span.start < 20_000]
    found = list(ResidentReader(some, files.read, whole=True))
    for span, data in found:
        assert np.array_equal(data.numpy(), files.data[span.file][span.start : span.stop])
    touched = {(s.file, page) for s in some for page in range(s.first, s.first + s.pages, PAGE)}
    assert found[0][1].untyped_storage().nbytes() == len(touched) * PAGE


def test_no_more_is_read_than_may_lie_ahead():
    files = Files()
    reader = iter(ResidentReader(spans(), files.read, whole=False))
    next(reader)
    # All that may be read before the second tensor is asked for: pieces that begin within the
    # limit, one of each thread beyond it.
    most = 8 + 2 * resident_reader.THREADS + 1
    assert sum(2 for _ in files.reads) <= most
    list(reader)
    assert not threads()


@pytest.mark.parametrize("whole", [False, True])
def test_an_error_reaches_who_reads(whole):
    files = Files()

    def fails(file, offset, into, needed):
        if (file, offset) == ("a", 9 * PAGE):
            raise OSError("the disk")
        files.read(file, offset, into, needed)

    def use():
        for span, data in ResidentReader(spans(), fails, whole=whole):
            assert np.array_equal(data.numpy(), files.data[span.file][span.start : span.stop])
            found.append(span)

    found = []
    with pytest.raises(OSError, match="the disk"):
        use()
    assert found == spans()[: len(found)]
    assert len(found) <= 3
    assert not threads()


def test_who_stops_early_leaves_no_thread():
    files = Files()
    for _ in ResidentReader(spans(), files.read, whole=False):
        break
    assert not threads()
