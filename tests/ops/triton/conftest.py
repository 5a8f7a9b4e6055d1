"""What the interpreter of Triton lacks."""

import os

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def products_of_bfloat16(monkeypatch):
    """The interpreter keeps bfloat16 as 16-bit integers and multiplies those (triton 3.9)."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    builder = interpreter.InterpreterBuilder
    create_dot = builder.create_dot

    def exact(handle):
        if handle.dtype.scalar != interpreter.tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), interpreter.tl.float32)

    def patched(self, a, b, *rest):
        return create_dot(self, exact(a), exact(b), *rest)

    monkeypatch.setattr(builder, "create_dot", patched)
