"""QMoE's dictionary: lossless for every row, and the rates of the published dictionary."""

import math

import pytest
import torch

from moekit.ops.codecs import make_codec
from moekit.ops.pair_dictionary import (
    LONGEST,
    SIZE,
    decode_rows,
    encode_rows,
    pair_dictionary,
)


def drawn(rows, width, zeros, seed=0):
    """Independent digits: `zeros` of them 0, the others 1 and 2 alike."""
    draw = torch.rand(rows, width, generator=torch.Generator().manual_seed(seed))
    return (draw >= zeros).to(torch.uint8) + (draw >= (1 + zeros) / 2).to(torch.uint8)


def test_every_prefix_of_an_entry_is_an_entry():
    found = pair_dictionary()
    assert bool((found.children[SIZE] >= 0).all())
    assert sorted(found.children[found.children >= 0].tolist()) == list(range(SIZE))
    parents, symbols = (found.children >= 0).nonzero()
    codes = found.children[parents, symbols]
    lengths = torch.tensor([*found.lengths.tolist(), 0])
    assert torch.equal(lengths[codes], lengths[parents] + 1)
    assert int(found.lengths.max()) == LONGEST


def test_entries_are_the_most_probable_sequences():
    found = pair_dictionary()
    used = torch.arange(2 * LONGEST) < 2 * torch.tensor(found.lengths)[:, None]
    price = -torch.tensor([0.885, 0.0575, 0.0575], dtype=torch.float64).log()
    cost = (price[torch.tensor(found.digits).long()] * used).sum(1)
    # In the order in which they were taken, and no extension of an entry was left out for a dearer.
    assert bool((cost.diff() >= -1e-9).all())
    assert float(cost.max()) == pytest.approx(float(cost[-1]))


@pytest.mark.parametrize("width", [1, 2, 3, 27, 28, 29, 64, 257])
@pytest.mark.parametrize("zeros", [0.0, 0.5, 0.9, 1.0])
def test_decoding_gives_back_every_row(width, zeros):
    digits = drawn(7, width, zeros)
    coded = encode_rows(digits)
    assert torch.equal(decode_rows(coded), digits)
    assert coded.codes.dtype == torch.int16
    assert int(coded.offsets[-1]) == len(coded.codes)


def test_cutting_is_greedy():
    digits = drawn(3, 400, 0.8)
    found, coded = pair_dictionary(), encode_rows(digits)
    entries = {bytes(found.digits[code, : 2 * found.lengths[code]]): code for code in range(SIZE)}
    for row in range(3):
        expected, at = [], 0
        while at < 400:
            length = next(
                n
                for n in range(2 * LONGEST, 0, -2)
                if at + n <= 400 and bytes(digits[row, at : at + n].tolist()) in entries
            )
            expected.append(entries[bytes(digits[row, at : at + length].tolist())])
            at += length
        codes = coded.codes[coded.offsets[row] : coded.offsets[row + 1]]
        assert (codes.int() & 0xFFFF).tolist() == expected


@pytest.mark.parametrize(
    ("zeros", "rate"), [(0.885, 0.733), (0.95, 0.591), (0.70, 1.69), (0.50, 2.95), (1.0, 16 / 28)]
)
def test_rates_of_independent_digits(zeros, rate):
    coded = encode_rows(drawn(400, 2800, zeros))
    # 1.1 million digits; the published rates have three digits.
    assert coded.bits_per_weight == pytest.approx(rate, rel=0.01)
    parts = (zeros, (1 - zeros) / 2, (1 - zeros) / 2)
    entropy = sum(-p * math.log2(p) for p in parts if p)
    assert coded.bits_per_weight > entropy


def test_min_max_levels_leave_nine_in_ten_weights_at_zero():
    codec = make_codec("ternary-rows")
    weight = torch.randn(64, 2048, generator=torch.Generator().manual_seed(0))
    codes = codec.codes(codec.encode(weight))
    assert float((codes == 1).float().mean()) == pytest.approx(0.91, abs=0.01)
    assert torch.equal(codec.decode(codec.encode(weight)) == 0, codes == 1)
