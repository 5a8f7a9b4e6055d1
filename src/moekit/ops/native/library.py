"""The compiled kernels, called from Python with torch tensors.

Shapes: T tokens, D width, K choices a token, P (token, expert) pairs.
"""

from __future__ import annotations

import ctypes
import functools
import os
import warnings
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from moekit.core.errors import UserError
from moekit.ops.native.build import BuildError, cached_library
from moekit.ops.native.structures import (
    FUNCTIONS,
    ExpertFormat,
    FfnJob,
    Format,
    MatmulJob,
)

ISAS = ("avx512", "avx2", "plain")


class Library:
    """The kernels, through the C interface of `native.h`; `c` has its functions as they are."""

    def __init__(self, path: str) -> None:
        self.c = ctypes.CDLL(path)
        for name, (result, arguments) in FUNCTIONS.items():
            function = getattr(self.c, name)
            function.restype, function.argtypes = result, arguments

    @property
    def isa(self) -> str:
        """The instruction set in use; the environment variable MOEKIT_ISA chooses another."""
        return self.c.native_isa().decode()

    def supports(self, isa: str) -> bool:
        """Whether this machine can run the kernels for `isa`."""
        return bool(self.c.native_supports(isa.encode()))

    def crc32(self, data: Tensor | memoryview | bytes, crc: int = 0) -> int:
        """CRC-32 of bytes as zlib computes it, continuing from `crc`."""
        view = data.contiguous().numpy() if isinstance(data, Tensor) else data
        array = np.frombuffer(view, dtype=np.uint8)
        return self.c.crc32_fast(crc, array.ctypes.data, array.nbytes)


class Pool:
    """Threads for the kernels; serves one call at a time, from any thread."""

    def __init__(self, library: Library, threads: int = 1) -> None:
        self.c = library.c
        self.handle = library.c.pool_new(threads)
        self.threads = max(1, threads)
        self._closer = weakref.finalize(self, library.c.pool_free, self.handle)

    def close(self) -> None:
        """End the threads; also done when the pool is forgotten and when the process ends."""
        self._closer()

    def matmul(self, matrix: Format, base: int, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x [T, cols] times the transposed matrix at address `base`: float32 [T, rows]."""
        return self.matmuls([(matrix, base)], x, None if out is None else [out])[0]

    def matmuls(
        self,
        matrices: Sequence[tuple[Format, int]],
        x: Tensor,
        outs: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        """Several matrices, each with its base address, times the same x [T, cols]."""
        x = _floats(x)
        if outs is None:
            outs = [torch.empty(len(x), matrix.rows) for matrix, _ in matrices]
        for (matrix, _), out in zip(matrices, outs, strict=True):
            if x.shape[1] != matrix.cols or out.shape != (len(x), matrix.rows):
                raise ValueError(
                    f"x {list(x.shape)} and out {list(out.shape)} do not fit a matrix "
                    f"[{matrix.rows}, {matrix.cols}]"
                )
        jobs = (MatmulJob * len(matrices))(
            *[
                MatmulJob(ctypes.pointer(matrix), base, out.data_ptr(), out.stride(0))
                for (matrix, base), out in zip(matrices, outs, strict=True)
            ]
        )
        self.c.matmuls(self.handle, jobs, len(jobs), x.data_ptr(), x.shape[1], len(x))
        return list(outs)

    def ffn(
        self,
        jobs: Sequence[tuple[ExpertFormat, int, int, int]],
        token_of_pair: Tensor,
        hidden: Tensor,
        out: Tensor,
    ) -> None:
        """Run experts on the rows of `hidden` [T, D] into `out` [P, D] (float32), not weighted.

        A job is an expert's format, its address, its first pair and its number of pairs;
        `token_of_pair` [P] (int32) says which row each pair reads.
        """
        made = (FfnJob * len(jobs))(
            *[FfnJob(ctypes.pointer(f), base, first, count) for f, base, first, count in jobs]
        )
        hidden = _floats(hidden)
        _check(token_of_pair, torch.int32)
        _check(out, torch.float32)
        self.c.ffn(
            self.handle,
            made,
            len(jobs),
            token_of_pair.data_ptr(),
            hidden.data_ptr(),
            hidden.shape[1],
            out.data_ptr(),
        )

    def combine(
        self,
        out_pairs: Tensor,
        pair_of: Tensor,
        weights: Tensor,
        out: Tensor,
        accumulate: bool = False,
    ) -> None:
        """out [T, D] = sum over k of weights [T, K] times the row pair_of [T, K] of `out_pairs`.

        A pair of -1 (int32) adds nothing. The order of the sum is that of k.
        """
        for tensor in (out_pairs, weights, out):
            _check(tensor, torch.float32)
        _check(pair_of, torch.int32)
        self.c.combine(
            self.handle,
            out_pairs.data_ptr(),
            pair_of.data_ptr(),
            weights.data_ptr(),
            *pair_of.shape,
            out.shape[1],
            out.data_ptr(),
            accumulate,
        )

    def read_memory(self, data: Tensor) -> int:
        """Read all of `data` and do nothing with it, to measure how fast memory is read.

        Returns the exclusive or of its 64-bit words, of whole lines of 64 bytes.
        """
        return self.c.read_memory(self.handle, data.data_ptr(), data.nbytes)


@functools.cache
def library() -> Library | None:
    """The kernels of this machine, compiled at their first use; None, after a warning that names
    the reason, where they cannot be.

    Raises UserError where MOEKIT_ISA asks for an instruction set that is none or not there.
    """
    try:
        found = Library(str(cached_library()))
    except (BuildError, OSError) as error:
        warnings.warn(
            f"moekit's CPU kernels are not available, torch's are used, which is slower: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    wanted = os.environ.get("MOEKIT_ISA")
    if wanted is not None and found.isa != wanted:
        usable = ", ".join(isa for isa in ISAS if found.supports(isa))
        raise UserError(f"MOEKIT_ISA is {wanted!r}; this machine runs {usable}")
    return found


def loaded() -> Library | None:
    """The kernels if `library` has made them in this process already, without making them now."""
    return library() if library.cache_info().currsize else None


def _floats(x: Tensor) -> Tensor:
    return x.to(torch.float32).contiguous()


def _check(tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype or not tensor.is_contiguous():
        raise ValueError(f"expected a contiguous {dtype} tensor, got {tensor.dtype}")
