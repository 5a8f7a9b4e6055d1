"""The kernels go through the whole compiler for real GPUs, which needs none."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")


def compiled(*codecs):
    """What `compile_ahead` found, in a process that does not interpret."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.triton.compile_ahead", *codecs],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check(found):
    for name, counts in found.items():
        assert not any(".local" in instruction for instruction in counts), name
        # What every GPU since 2017 gives a block without being asked.
        assert counts["shared"] <= 48 * 1024, name
        products = name.startswith(("block", "training")) and "sum" not in name
        if products and "*fp32" not in name:
            assert any("mma" in instruction for instruction in counts), name


def test_kernels_compile():
    found = compiled("int4")
    check(found)
    # Four codes a load, and none is read byte by byte.
    assert not any(i.startswith("ld.global.b8") for c in found.values() for i in c)


@pytest.mark.slow
def test_kernels_compile_for_every_codec():
    check(compiled("int8", "int3-zp", "int2", "nested4", "bf16"))
