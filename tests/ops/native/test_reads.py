"""Records read in the background: their bytes and checksums, their order, faults and the end."""

import ctypes
import errno
import os
import random
import threading
import time
import zlib

import numpy as np
import pytest

from moekit.ops.native.reads import CUT_SHORT, WHOLE, Reads, ranges

PAGE = 4096
# In pieces of a page a record of this size takes some 50 ms, and a call a hundredth of one.
LONG = 2**27


@pytest.fixture
def content(tmp_path):
    """The first 200 pages of a file; what comes after is a hole."""
    data = np.random.default_rng(0).integers(0, 256, 200 * PAGE, dtype=np.uint8)
    data.tofile(tmp_path / "file")
    os.truncate(tmp_path / "file", LONG)
    return data


@pytest.fixture
def file(content, tmp_path):
    number = os.open(tmp_path / "file", os.O_RDONLY)
    yield number
    os.close(number)


class Reading:
    """Submits records of a file and keeps what they need alive."""

    def __init__(self, kernels, file, in_flight=3, piece=4 * PAGE):
        self.reads, self.file = Reads(kernels, in_flight, piece), file
        self.into, self.sums = {}, {}

    def submit(self, number, start, size, parts=None, urgent=True, file=None):
        parts = [(0, size, 0)] if parts is None else parts
        self.into[number] = np.zeros(size, np.uint8)
        self.sums[number] = (ctypes.c_uint32 * (1 + max((part[2] for part in parts), default=0)))()
        self.reads.submit(
            number,
            self.file if file is None else file,
            start,
            size,
            self.into[number].ctypes.data,
            ranges(parts),
            self.sums[number],
            urgent=urgent,
        )

    def wait(self):
        done = self.reads.wait(30)
        assert done is not None
        return done


@pytest.mark.parametrize(("in_flight", "piece"), [(1, PAGE), (3, 4 * PAGE), (2, 2**21), (8, PAGE)])
def test_bytes_and_checksums(kernels, content, file, in_flight, piece):
    """Records of any size, several at once, checksums of parts that leave a hole."""
    rng = random.Random(in_flight)
    reading = Reading(kernels, file, in_flight, piece)
    places = {}
    for number in range(40):
        size = rng.choice([1, 2, 3, 30, 61]) * PAGE
        start = rng.randrange(200 - size // PAGE + 1) * PAGE
        cut = rng.randrange(size - 30)
        places[number] = start, size, cut
        parts = [(0, cut, 0), (cut + 7, size, 0), (5, cut + 20, 1)]
        reading.submit(number, start, size, parts, urgent=rng.random() < 0.5)
    seen = set()
    for _ in places:
        number, status = reading.wait()
        assert status == WHOLE
        start, size, cut = places[number]
        record = content[start : start + size]
        assert np.array_equal(reading.into[number], record)
        holed = np.concatenate([record[:cut], record[cut + 7 :]])
        assert list(reading.sums[number]) == [
            zlib.crc32(holed.tobytes()),
            zlib.crc32(record[5 : cut + 20].tobytes()),
        ]
        seen.add(number)
    assert seen == set(places)
    assert reading.reads.wait(0) is None
    reading.reads.close()


def test_urgent_records_come_first_and_in_order(kernels, file):
    reading = Reading(kernels, file, in_flight=1, piece=PAGE)
    # All others are in line before it is through; without checksums, records end as they are read.
    reading.submit(0, 0, LONG, [])
    for number in (1, 2, 3):
        reading.submit(number, 0, LONG // 4, [], urgent=False)
    for number in (4, 5):
        reading.submit(number, 0, LONG // 4, [])
    reading.reads.hurry(2)
    assert [reading.wait()[0] for _ in range(6)] == [0, 4, 5, 2, 1, 3]
    reading.reads.close()


def test_a_demand_overtakes_a_record_that_has_begun(kernels, file):
    reading = Reading(kernels, file, in_flight=1, piece=PAGE)
    reading.submit(0, 0, LONG, urgent=False)
    reading.submit(1, 0, PAGE)
    assert [reading.wait() for _ in range(2)] == [(1, WHOLE), (0, WHOLE)]
    reading.reads.close()


def test_what_has_not_begun_can_be_taken_back(kernels, content, file):
    reading = Reading(kernels, file, in_flight=1, piece=PAGE)
    reading.submit(0, 0, LONG)
    reading.submit(1, 0, PAGE)
    reading.submit(2, PAGE, PAGE, urgent=False)
    assert reading.reads.cancel(1)
    assert not reading.reads.cancel(1)
    assert {reading.wait()[0] for _ in range(2)} == {0, 2}
    assert not reading.reads.cancel(0)
    assert not reading.into[1].any()
    # Its number can be used again.
    reading.submit(1, PAGE, PAGE)
    assert reading.wait() == (1, WHOLE)
    assert np.array_equal(reading.into[1], content[PAGE : 2 * PAGE])
    reading.reads.close()


def test_faults_belong_to_their_record(kernels, content, file):
    reading = Reading(kernels, file)
    closed = os.dup(file)
    os.close(closed)
    reading.submit(0, LONG - 5 * PAGE, 10 * PAGE)
    reading.submit(1, 0, 30 * PAGE, file=closed)
    reading.submit(2, 0, 30 * PAGE)
    ended = dict(reading.wait() for _ in range(3))
    assert ended == {0: CUT_SHORT, 1: errno.EBADF, 2: WHOLE}
    assert np.array_equal(reading.into[2], content[: 30 * PAGE])
    reading.reads.close()


def test_closing_wakes_who_waits_and_drops_the_rest(kernels, file):
    reading = Reading(kernels, file, in_flight=1, piece=PAGE)
    found: list = []
    waiting = threading.Thread(target=lambda: found.append(reading.reads.wait(30)))
    waiting.start()
    reading.reads.close()
    waiting.join(30)
    assert found == [None]
    reading.submit(0, 0, PAGE)
    assert reading.reads.wait(0.01) is None
    assert not reading.into[0].any()
    # Many records in line, and memory that is gone right after.
    for _ in range(20):
        reading = Reading(kernels, file, piece=PAGE)
        for number in range(30):
            reading.submit(number, 0, 50 * PAGE, urgent=number % 2 == 0)
        reading.reads.close()
        for into in reading.into.values():
            into[:] = 7
        # As long as reading a hundred of these pieces takes.
        time.sleep(0.001)
        assert all((into == 7).all() for into in reading.into.values())


def test_threads_without_work_sleep(kernels, file):
    reading = Reading(kernels, file)
    reading.submit(0, 0, 100 * PAGE)
    reading.wait()
    before = os.times()
    time.sleep(0.5)
    after = os.times()
    # Less than a tenth of one core: spinning threads would take two.
    assert after.user + after.system - before.user - before.system < 0.05
    reading.reads.close()
