"""QMoE's lossless code of sparse ternary rows: 16 bits for up to 28 weights.

QMoE, arXiv 2310.16795. A dictionary of 2^16 sequences of pairs of digits, the most probable ones if
digits were independent, zero mostly; rows are cut greedily into the longest sequences that it has.
Every prefix of an entry is an entry, so the longest is found by following a tree until it ends.

Digits: 0 for a weight of zero, 1 for low, 2 for high; a symbol is a pair of them. Shapes: O rows,
I weights of a row, S symbols of a row, C codes of a row.
"""

from __future__ import annotations

import functools
import heapq
import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SIZE = 2**16
PAIRS = 9
LONGEST = 14
# The paper's digit probabilities, of a matrix of 88.5 % zeros.
PROBABILITIES = (0.885, 0.0575, 0.0575)


@dataclass(frozen=True)
class PairDictionary:
    """`digits` [2^16, 28] and `lengths` [2^16] in symbols; `children` [2^16 + 1, 9] is the tree.

    A node of the tree is a code; the root is 2^16, and -1 means that there is no such entry.
    """

    digits: NDArray[np.uint8]
    lengths: NDArray[np.int64]
    children: NDArray[np.int32]


@dataclass(frozen=True)
class CodedRows:
    """Rows [O, `width`] as codes: those of row i are `codes`[`offsets`[i]:`offsets`[i + 1]]."""

    codes: Tensor  # int16 [sum of C], the bits of an unsigned number
    offsets: Tensor  # int32 [O + 1]
    width: int

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.offsets.nbytes

    @property
    def bits_per_weight(self) -> float:
        """Bits of the codes alone for each weight."""
        return 8 * self.codes.nbytes / ((len(self.offsets) - 1) * self.width)


@functools.lru_cache(maxsize=4)
def pair_dictionary(probabilities: tuple[float, float, float] = PROBABILITIES) -> PairDictionary:
    """The dictionary for digits of such probabilities, zero first."""
    costs = [
        -math.log(probabilities[first] * probabilities[second])
        for first in range(3)
        for second in range(3)
    ]
    digits = np.zeros((SIZE, 2 * LONGEST), dtype=np.uint8)
    lengths = np.zeros(SIZE, dtype=np.int64)
    children = np.full((SIZE + 1, PAIRS), -1, dtype=np.int32)
    # (cost, symbols): of equally probable sequences the one that sorts first.
    heap: list[tuple[float, bytes, int]] = [
        (cost, bytes([symbol]), SIZE) for symbol, cost in enumerate(costs)
    ]
    heapq.heapify(heap)
    for code in range(SIZE):
        cost, symbols, parent = heapq.heappop(heap)
        children[parent, symbols[-1]] = code
        lengths[code] = len(symbols)
        pairs = np.frombuffer(symbols, dtype=np.uint8)
        digits[code, 0 : 2 * len(symbols) : 2] = pairs // 3
        digits[code, 1 : 2 * len(symbols) : 2] = pairs % 3
        if len(symbols) < LONGEST:
            for symbol, extra in enumerate(costs):
                heapq.heappush(heap, (cost + extra, symbols + bytes([symbol]), code))
    return PairDictionary(digits, lengths, children)


def encode_rows(digits: Tensor, dictionary: PairDictionary | None = None) -> CodedRows:
    """Code rows of digits 0, 1, 2, [O, I]; an odd row gets a zero at its end."""
    dictionary = dictionary or pair_dictionary()
    rows, width = digits.shape
    padded = np.zeros((rows, width + width % 2), dtype=np.int64)
    padded[:, :width] = digits.numpy()
    symbols = padded[:, 0::2] * 3 + padded[:, 1::2]
    node = np.full(rows, SIZE, dtype=np.int64)
    # One symbol of every row at a time: a row emits its code where its entry cannot go on.
    emitted = np.full((symbols.shape[1] + 1, rows), -1, dtype=np.int64)
    for at in range(symbols.shape[1]):
        following = dictionary.children[node, symbols[:, at]]
        ended = following < 0
        emitted[at, ended] = node[ended]
        restarted = dictionary.children[SIZE, symbols[:, at]]
        node = np.where(ended, restarted, following).astype(np.int64)
    if symbols.shape[1]:
        emitted[-1] = node
    by_row = emitted.T
    kept = by_row >= 0
    offsets = np.concatenate([[0], kept.sum(1).cumsum()]).astype(np.int32)
    codes = by_row[kept].astype(np.uint16).view(np.int16)
    return CodedRows(torch.from_numpy(codes), torch.from_numpy(offsets), width)


def decode_rows(coded: CodedRows, dictionary: PairDictionary | None = None) -> Tensor:
    """The digits [O, I], uint8, of coded rows."""
    dictionary = dictionary or pair_dictionary()
    codes = coded.codes.numpy().view(np.uint16)
    rows = len(coded.offsets) - 1
    used = np.arange(2 * LONGEST) < 2 * dictionary.lengths[codes][:, None]
    digits = dictionary.digits[codes][used].reshape(rows, coded.width + coded.width % 2)
    return torch.from_numpy(digits[:, : coded.width].copy())
