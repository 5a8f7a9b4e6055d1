"""A table of the resident part that stays on disk: its rows are read when they are needed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from moekit.runtime.store import ExpertStore, StoreError, crc32

# A read has at least one row and about so many bytes, each with a checksum of its own.
BLOCK_BYTES = 2**14
# Reads in flight: a small one waits for the disk nearly all of its time.
READERS = 8


class RowsOnDisk:
    """Rows of the tensor `name` [V, D] of `store`, `most` of them at a time in `table`.

    An embedding of a large vocabulary takes as much memory as hundreds of experts, and a token
    needs one row of it. Lossless. Opening reads it once to verify it and to take the checksums that
    later reads are compared with. Raises StoreError for damage.
    """

    def __init__(self, store: ExpertStore, name: str, most: int) -> None:
        ((_, whole),) = store.resident_stored(names=[name])
        self._store, self._name = store, name
        self._row_bytes = whole[0].nbytes
        self._rows = max(1, BLOCK_BYTES // self._row_bytes)
        data, step = whole.reshape(-1).view(torch.uint8).numpy().data, self._rows * self._row_bytes
        self._stop = len(data)
        self._sums = np.array(
            [crc32(data[start : start + step]) for start in range(0, len(data), step)], np.uint32
        )
        self.table = torch.zeros(most, *whole.shape[1:], dtype=whole.dtype)
        self._readers = ThreadPoolExecutor(READERS, "embedding-reader")

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.table.nbytes + self._sums.nbytes

    def fetch(self, ids: ArrayLike) -> None:
        """Put row ids[i] of the tensor into row i of `table`."""
        blocks, of = np.unique(np.asarray(ids) // self._rows, return_inverse=True)
        read = map if len(blocks) == 1 else self._readers.map
        found = list(read(self._block, blocks.tolist()))
        for place, (row, block) in enumerate(zip(np.asarray(ids).tolist(), of, strict=True)):
            self.table[place] = found[block][row % self._rows]

    def close(self) -> None:
        """End the threads."""
        self._readers.shutdown()

    def _block(self, number: int) -> Tensor:
        start = number * self._rows * self._row_bytes
        stop = min(start + self._rows * self._row_bytes, self._stop)
        data = self._store.resident_bytes(self._name, start, stop)
        if crc32(data.numpy().data) != self._sums[number]:
            raise StoreError(
                f"{self._store.path}: bytes {start} to {stop} of tensor {self._name} have changed "
                "since it was opened. Copy the file again or convert the model again."
            )
        return data.clone().view(self.table.dtype).view(-1, *self.table.shape[1:])
