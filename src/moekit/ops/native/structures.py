"""The structures of `native.h` for ctypes."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_char_p, c_float, c_int32, c_int64, c_uint16, c_void_p

F32, BF16, F16, GROUPS = range(4)
MAX_FIELDS = 8
# The width of a field whose codes are in base three, five in a byte.
TRITS = 5
ACTIVATIONS = (
    "silu",
    "gelu",
    "gelu_tanh",
    "relu",
    "relu2",
    "clamped_swiglu",
    "quick_gelu",
    "identity",
)


class Field(Structure):
    """A bit field of the codes of a matrix."""

    _fields_ = (
        *((name, c_int64) for name in ("codes", "scale", "zero")),
        *((name, c_int32) for name in ("stride", "first", "width", "shift")),
        ("lut", c_uint16 * 32),
    )


class Format(Structure):
    """How a matrix [rows, cols] is stored, as offsets from a base address."""

    _fields_ = (
        *((name, c_int32) for name in ("kind", "rows", "cols", "group", "num_fields", "pad")),
        ("data", c_int64),
        ("fields", Field * MAX_FIELDS),
    )


class ExpertFormat(Structure):
    """The matrices, biases and activation of an expert."""

    _fields_ = (
        *((name, Format) for name in ("gate", "up", "down")),
        *((name, c_int32) for name in ("has_gate", "activation")),
        *((name, c_float) for name in ("alpha", "limit")),
        *((name, c_int64) for name in ("gate_bias", "up_bias", "down_bias")),
        *((name, c_int32) for name in ("bias_kind", "pad")),
    )


class MatmulJob(Structure):
    """A matrix, where its product goes, and what it is multiplied by if not by the call's x."""

    _fields_ = (
        ("format", POINTER(Format)),
        ("base", c_void_p),
        ("y", c_void_p),
        ("y_stride", c_int64),
        ("x", c_void_p),
        ("x_stride", c_int64),
    )


class FfnJob(Structure):
    """An expert, and the pairs that go through it."""

    _fields_ = (
        ("format", POINTER(ExpertFormat)),
        ("base", c_void_p),
        ("first", c_int32),
        ("count", c_int32),
    )


_I, _L, _P = c_int32, c_int64, c_void_p
# Name -> result and arguments.
FUNCTIONS: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "pool_new": (_P, (_I,)),
    "pool_free": (None, (_P,)),
    "pool_threads": (_I, (_P,)),
    "matmul": (None, (_P, POINTER(Format), _P, _P, _I, _P)),
    "matmuls": (None, (_P, POINTER(MatmulJob), _I, _P, _L, _I)),
    "ffn": (None, (_P, POINTER(FfnJob), _I, _P, _P, _I, _P)),
    "combine": (None, (_P, _P, _P, _P, _I, _I, _I, _P, _I)),
    "crc32_fast": (ctypes.c_uint32, (ctypes.c_uint32, _P, ctypes.c_size_t)),
    "read_memory": (ctypes.c_uint64, (_P, _P, ctypes.c_size_t)),
    "native_isa": (c_char_p, ()),
    "native_supports": (_I, (c_char_p,)),
}
