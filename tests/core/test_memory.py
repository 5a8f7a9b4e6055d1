"""Bytes: parsing, printing, measuring, and tables for a model."""

import mmap

import pytest

from moekit.core.errors import UserError
from moekit.core.memory import (
    PeakMemory,
    bits_per_weight,
    bytes_of,
    fit_table,
    fits,
    format_bytes,
    memory_table,
    model_bytes,
    rss_anon,
)
from moekit.core.seeds import derive_seed, generator

PARTS = {"embedding": 1000, "attention": 2000, "router": 320, "routed": 64000, "other": 10}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("14GB", 14 * 10**9),
        ("14gb", 14 * 10**9),
        ("14G", 14 * 10**9),
        ("14GiB", 14 * 2**30),
        ("1.5 MiB", 3 * 2**19),
        ("512", 512),
        ("512B", 512),
        ("2TB", 2 * 10**12),
        (77, 77),
    ],
)
def test_bytes_of(text, expected):
    assert bytes_of(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "14XB", "14iB", "1e9", "fourteen"])
def test_bytes_of_says_what_is_accepted(text):
    with pytest.raises(UserError, match="14GiB"):
        bytes_of(text)


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, "0 B"),
        (640, "640 B"),
        (999_600, "1.00 MB"),
        (14 * 10**9, "14.0 GB"),
        (512 * 10**6, "512 MB"),
        (1.234e12, "1.23 TB"),
        (5e15, "5000 TB"),
    ],
)
def test_format_bytes(count, expected):
    assert format_bytes(count) == expected


def test_peak_memory_sees_an_allocation_that_is_gone_at_the_end():
    size = 64 * 2**20
    with PeakMemory(interval=0.001) as memory:
        # Fresh pages from the kernel: malloc may hand out a free piece of heap that is resident.
        block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        block[::4096] = b"x" * (size // 4096)
        sampled = rss_anon()
        while memory.peak < sampled - 2**20:
            pass
        block.close()
    # Pages touched are counted exactly; one MiB of slack covers what the sampler itself allocates.
    assert size - 2**20 < memory.above_start < size + 8 * 2**20
    assert rss_anon() < memory.peak


def test_rss_anon_of_a_missing_process():
    with pytest.raises(UserError, match="/proc"):
        rss_anon(2**30)


def test_table_sums_and_keeps_the_router_at_16_bits():
    table = memory_table(PARTS)
    assert table["routed"][16] == 128000
    assert table["routed"][4] == 64000 * 4.5 / 8
    assert table["router"] == {32: 1280, 16: 640, 8: 640, 4: 640}
    assert "shared" not in table
    for bits in (32, 16, 8, 4):
        assert table["total"][bits] == model_bytes(PARTS, bits)
    assert table["total"][32] == 4 * sum(PARTS.values())


def test_table_refuses_a_part_it_does_not_know():
    with pytest.raises(ValueError, match="banana"):
        memory_table({"banana": 1})


def test_scales_are_counted_below_16_bits():
    assert [bits_per_weight(b) for b in (32, 16, 8, 4)] == [32, 16, 8.5, 4.5]


def test_fits_gives_the_fraction_of_experts_beside_the_resident_part():
    routed = 64000 * 2
    resident = model_bytes(PARTS, 16) - routed
    half = fits(PARTS, resident + routed // 2, bit_widths=[16], reserve=0)[0]
    assert (half.whole, half.resident, half.expert_fraction) == (False, True, 0.5)
    exact = fits(PARTS, resident + routed, bit_widths=[16], reserve=0)[0]
    assert exact.whole
    assert exact.expert_fraction == 1.0
    none = fits(PARTS, resident - 1, bit_widths=[16], reserve=0)[0]
    assert (none.whole, none.resident, none.expert_fraction) == (False, False, 0.0)
    assert not fits(PARTS, resident + routed, bit_widths=[16], reserve=0.1)[0].whole


def test_fit_table_stops_when_everything_fits():
    parts = {"embedding": 10**9, "routed": 3 * 10**9}
    table = fit_table(parts)
    assert list(table) == [8, 12, 16, 24]
    assert [fit.whole for fit in table[12]] == [False, True, True, True]
    assert all(fit.whole for fit in table[24])


def test_seeds_depend_on_every_part_of_the_key_and_on_nothing_else():
    keys = [(0, "init", None), (1, "init", None), (0, "drop", None), (0, "init", 0), (0, "init", 1)]
    seeds = [derive_seed(*key) for key in keys]
    assert len(set(seeds)) == len(seeds)
    assert seeds == [derive_seed(*key) for key in keys]
    # A stored value: a change of the derivation would change every recorded result.
    assert derive_seed(0, "init", 3) == 5646747284201214342
    assert generator(0, "init").initial_seed() == derive_seed(0, "init")
