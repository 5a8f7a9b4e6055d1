"""Threads: they sleep when idle, end with the process, and take part in any order."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from moekit.ops import native
from moekit.ops.codecs import make_codec
from moekit.ops.native import formats


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_many_short_calls(kernels, threads):
    """More threads than cores, or than there is work for: some come late, some never."""
    codec = make_codec("int4")
    weight = torch.randn(320, 128)
    matrix, memory = formats.in_memory(codec, codec.encode(weight))
    x = torch.randn(5, 128)
    pool = native.Pool(kernels, threads)
    expected = pool.matmul(matrix, memory.data_ptr(), x)
    for _ in range(1000):
        assert torch.equal(pool.matmul(matrix, memory.data_ptr(), x), expected)
    pool.close()


def test_many_short_lives(kernels):
    matrix = formats.plain_format((64, 64), torch.float32)
    weight, x = torch.randn(64, 64), torch.randn(2, 64)
    for _ in range(100):
        pool = native.Pool(kernels, 3)
        pool.matmul(matrix, weight.data_ptr(), x)
        pool.close()


def test_threads_end_with_the_process(kernels):
    """Pools that nobody closed, asleep or not, neither keep a process alive nor crash it."""
    code = (
        "import sys; from moekit.ops import native; kernels = native.Library(sys.argv[1]);"
        "pools = [native.Pool(kernels, n) for n in (1, 2, 4)]; print('done')"
    )
    command = [sys.executable, "-c", code, kernels.c._name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.returncode) == ("done\n", 0), done.stderr


def test_idle_threads_sleep(kernels):
    """A pool between calls takes next to no processor time."""
    pool = native.Pool(kernels, 2)
    x = torch.randn(4, 64)
    weight = torch.randn(64, 64)
    matrix = formats.plain_format((64, 64), torch.float32)
    pool.matmul(matrix, weight.data_ptr(), x)
    before = os.times()
    time.sleep(0.5)
    after = os.times()
    pool.close()
    # Half a second of spinning would be half a second; the spin ends after a ten-thousandth.
    assert (after.user + after.system) - (before.user + before.system) < 0.2


def test_reading_memory_reads_all_of_it(kernels):
    data = torch.randint(0, 2**62, (3, 2**17 + 16), dtype=torch.int64)
    pool = native.Pool(kernels, 2)
    assert pool.read_memory(data) == int(np.bitwise_xor.reduce(data.numpy(), axis=None))
    pool.close()


def test_a_closed_pool_can_be_closed_again(kernels):
    pool = native.Pool(kernels, 3)
    assert kernels.c.pool_threads(pool.handle) == 3
    pool.close()
    pool.close()
