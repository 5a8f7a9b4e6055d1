"""The contract of every registered codec, and what is particular to some.

O rows, I columns, G columns a group.
"""

import itertools

import pytest
import torch

from moekit.core.errors import UserError
from moekit.core.registry import registry
from moekit.ops.codecs import Encoded, make_codec
from moekit.ops.codecs import codec as codec_module
from moekit.ops.codecs.bit_fields import pack_bits, packed_bytes, unpack_bits

NAMES = [method.name for method in registry.methods(kind="codec")]
PLAIN = {"fp32", "bf16", "fp16"}
BY_ROW = {"ternary-rows"}
GROUPED = [name for name in NAMES if name not in PLAIN | BY_ROW]
EVERY = [(name, 32) for name in NAMES] + [(name, g) for name in GROUPED for g in (64, 128)]
IDEMPOTENT = [(name, g) for name, g in EVERY if make_codec(name).idempotent]
# Divisions and products in float32, of steps up to 255 in int8.
ARITHMETIC = 1 + 1e-4


def weights(kind="normal", rows=6, columns=384):
    generator = torch.Generator().manual_seed(3)
    normal = torch.randn(rows, columns, generator=generator) * 0.05
    match kind:
        case "zeros":
            return torch.zeros(rows, columns)
        case "constant":
            return torch.full((rows, columns), 0.3) * torch.arange(-2, rows - 2)[:, None]
        case "outliers":
            normal[:, ::37] *= 100
        case "positive":
            return normal.abs() + 0.1
        case "tiny":
            # Scales far below the smallest normal float16.
            return normal * 1e-6
        case "sparse":
            return normal * (torch.rand(rows, columns, generator=generator) < 0.1)
    return normal


KINDS = ("normal", "zeros", "constant", "outliers", "positive", "tiny", "sparse")


def same(a, b):
    return a.shape == b.shape and all(
        p.keys() == q.keys() and all(torch.equal(p[n], q[n]) for n in p)
        for p, q in zip(a.planes, b.planes, strict=True)
    )


def test_there_are_the_promised_codecs():
    integers = {f"int{bits}{zp}" for bits in (8, 4, 3, 2) for zp in ("", "-zp")}
    others = {"binary", "ternary", "ternary-zp", "nested3", "nested4"}
    assert integers | PLAIN | others <= set(NAMES)


@pytest.mark.parametrize(("name", "group_size"), EVERY)
def test_error_is_within_the_bound(name, group_size):
    codec = make_codec(name, group_size)
    for kind in KINDS:
        weight = weights(kind)
        encoded = codec.encode(weight)
        for planes in range(1, codec.num_planes + 1):
            part = encoded.prefix(planes)
            error = (codec.decode(part) - weight).abs()
            bound = codec.error_bound(weight, part)
            assert bound.shape == weight.shape
            assert bool((error <= bound * ARITHMETIC).all()), (kind, float((error - bound).max()))


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("int")])
def test_the_bound_is_half_a_step_and_is_reached(name):
    codec, weight = make_codec(name), weights()
    levels = 2 ** int(name[3]) - 1
    grouped = weight.unflatten(1, (-1, 32))
    if name.endswith("-zp"):
        step = (grouped.amax(-1).clamp(min=0) - grouped.amin(-1).clamp(max=0)) / levels
    else:
        step = 2 * grouped.abs().amax(-1) / (levels - 1)
    bound = codec.error_bound(weight, codec.encode(weight))
    # The stored step is rounded up to 11 bits.
    assert torch.allclose(bound[:, ::32], step / 2, rtol=2**-10, atol=0)
    error = (codec.decode(codec.encode(weight)) - weight).abs()
    assert float((error / bound).max()) > 0.97


@pytest.mark.parametrize(("name", "group_size"), IDEMPOTENT)
def test_encoding_again_changes_nothing(name, group_size):
    codec = make_codec(name, group_size)
    for kind in KINDS:
        # Scales below the normal float16 have too few bits to hit the last level again.
        if kind != "tiny" or not name.startswith("int"):
            encoded = codec.encode(weights(kind))
            assert same(codec.encode(codec.decode(encoded)), encoded), kind


def test_only_zero_points_and_planes_are_not_idempotent():
    left = {name for name in NAMES if not make_codec(name).idempotent}
    assert left == {n for n in NAMES if n.startswith("nested") or (n[:3] == "int" and "-zp" in n)}


@pytest.mark.parametrize(("name", "group_size"), EVERY)
def test_matmul_is_decode_then_matmul(name, group_size):
    codec, weight = make_codec(name, group_size), weights()
    encoded = codec.encode(weight)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(5, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(dtype)
        out = codec.matmul(x, encoded)
        assert out.dtype == dtype
        assert torch.equal(out, x @ codec.decode(encoded).to(dtype).T)


@pytest.mark.parametrize("name", NAMES)
def test_blocks_of_rows_and_dtypes_do_not_matter(name, monkeypatch):
    codec, weight = make_codec(name), weights().bfloat16()
    whole = codec.encode(weight)
    assert same(codec.encode(weight), whole)
    assert same(codec.encode(weight.float()), whole)
    assert same(codec.encode(weight.T.contiguous().T), whole)
    monkeypatch.setattr(codec_module, "BLOCK_ELEMENTS", 2 * weight.shape[1])
    assert same(codec.encode(weight), whole)


@pytest.mark.parametrize("name", NAMES)
def test_layout_is_what_is_made(name):
    codec, weight = make_codec(name), weights()
    encoded = codec.encode(weight)
    layout = codec.layout((6, 384))
    assert len(layout) == codec.num_planes == len(encoded.planes)
    for plane, made in zip(layout, encoded.planes, strict=True):
        assert [p.name for p in plane] == list(made)
        for part in plane:
            assert (part.shape, part.dtype) == (made[part.name].shape, made[part.name].dtype)
            assert part.shape[0] == 6
    assert encoded.nbytes == codec.nbytes((6, 384))
    assert codec.bits_per_weight((6, 384)) == encoded.nbytes * 8 / weight.numel()


@pytest.mark.parametrize(
    ("name", "group_size", "bits"),
    [
        ("fp32", 32, 32), ("bf16", 32, 16), ("int8", 32, 8.5), ("int4", 32, 4.5),
        ("int4", 128, 4.125), ("int4-zp", 64, 4.375), ("int3", 32, 3.5), ("int2", 64, 2.25),
        ("ternary", 128, 1.75), ("ternary-zp", 128, 1.875), ("nested4", 128, 4.4375),
    ],
)  # fmt: skip
def test_bits_per_weight(name, group_size, bits):
    assert make_codec(name, group_size).bits_per_weight((8, 256)) == bits


@pytest.mark.parametrize("name", ["nested3", "nested4", "nested6"])
def test_dropping_planes_gives_the_codec_of_fewer_bits(name):
    weight = weights()
    full = make_codec(name).encode(weight)
    errors = []
    for planes in range(1, len(full.planes) + 1):
        bits = planes + 1
        lower = make_codec(f"nested{bits}" if bits > 2 else "int2-zp")
        alone, prefix = lower.encode(weight), full.prefix(planes)
        assert same(alone, prefix)
        assert torch.equal(lower.decode(alone), make_codec(name).decode(prefix))
        errors.append(float((lower.decode(alone) - weight).square().mean()))
    assert all(b < a / 3 for a, b in itertools.pairwise(errors))


def test_a_plane_is_the_least_squares_step():
    """Against the paper's rule, group by group in a loop."""
    weight = weights(rows=2, columns=64)
    start = make_codec("int2-zp").decode(make_codec("int2-zp").encode(weight))
    plane = make_codec("nested3").encode(weight).planes[1]
    for row, group in itertools.product(range(2), range(2)):
        missing = (weight - start)[row, 32 * group : 32 * group + 32]
        assert plane["scale"][row, group] == missing.abs().mean().half()
        signs = unpack_bits(plane["sign"][row, group], 1, 32)
        assert torch.equal(signs.bool(), missing >= 0)


def test_ternary_is_the_best_of_all_ways():
    """Every threshold tried, for both signs together and apart."""
    weight = weights(rows=4, columns=32)
    one = make_codec("ternary").decode(make_codec("ternary").encode(weight))
    two = make_codec("ternary-zp").decode(make_codec("ternary-zp").encode(weight))
    for row in range(4):
        best = {}
        for side in (1, -1, 0):
            w = weight[row].abs() if side == 0 else (weight[row] * side).clamp(min=0)
            losses = []
            for threshold in w[w > 0]:
                kept = w >= threshold
                losses.append(float((w - kept * w[kept].mean()).square().sum()))
            best[side] = min(losses)
        # Levels are float16.
        assert float((one[row] - weight[row]).square().sum()) == pytest.approx(best[0], rel=1e-4)
        total = best[1] + best[-1]
        assert float((two[row] - weight[row]).square().sum()) == pytest.approx(total, rel=1e-4)


def test_more_bits_smaller_error():
    weight = weights()
    for names in (["int2", "int3", "int4", "int8"], ["int2-zp", "int3-zp", "int4-zp", "int8-zp"]):
        errors = [
            float((c.decode(c.encode(weight)) - weight).square().mean())
            for c in map(make_codec, names)
        ]
        assert all(b < a / 3 for a, b in itertools.pairwise(errors))


@pytest.mark.parametrize(("bits", "group_size"), itertools.product(range(1, 9), (32, 64, 128)))
def test_bit_fields(bits, group_size):
    values = torch.randint(0, 2**bits, (3, 2, group_size), generator=torch.Generator())
    values[0, 0, :2] = torch.tensor([0, 2**bits - 1])
    packed = pack_bits(values, bits)
    assert packed.shape == (3, 2, packed_bytes(group_size, bits))
    assert torch.equal(unpack_bits(packed, bits, group_size).long(), values)


def test_bit_fields_lie_as_documented():
    values = torch.arange(32) % 8
    packed = pack_bits(values, 3)
    for j in range(8):
        low = sum((int(values[j + 8 * k]) & 3) << 2 * k for k in range(4))
        assert int(packed[j]) == low
    for j in range(4):
        assert int(packed[8 + j]) == sum((int(values[j + 4 * k]) >> 2) << k for k in range(8))


@pytest.mark.parametrize("name", GROUPED)
def test_widths_that_do_not_fit_are_refused(name):
    with pytest.raises(UserError, match=r"80 columns.* groups of 64 \(16 left over\)"):
        make_codec(name, 64).encode(torch.zeros(4, 80))
    with pytest.raises(UserError, match="group size 48 is not one of 32, 64 and 128"):
        make_codec(name, 48)


@pytest.mark.parametrize("name", NAMES)
def test_wrong_weights_are_refused(name):
    bad = weights()
    bad[3, 5] = torch.nan
    bad[4, 6] = torch.inf
    with pytest.raises(UserError, match="2 of the weights in rows 0 to 5 are NaN or infinite"):
        make_codec(name).encode(bad)
    with pytest.raises(UserError, match=r"shape \[32\]"):
        make_codec(name).encode(torch.zeros(32))
    if name not in ("fp32", "bf16"):
        with pytest.raises(UserError, match=r"take .*fp32"):
            make_codec(name).encode(torch.full((2, 32), 1e30) * torch.tensor([1.0, -1.0])[:, None])


def test_unknown_codec():
    with pytest.raises(UserError, match="did you mean int4"):
        make_codec("int44")


@pytest.mark.parametrize("name", [n for n in GROUPED if not n.startswith("nested")])
def test_the_steps_of_a_grid_codec_are_its_encoding(name):
    codec, weight = make_codec(name), weights()
    grouped = weight.unflatten(1, (-1, 32))
    grid = codec.fit(grouped)
    columns = {key: values[..., None] for key, values in grid.items()}
    codes = codec.nearest(grouped, columns)
    encoded = codec.encode(weight)
    assert same(Encoded((6, 384), (codec.pack(codes, grid),)), encoded)
    assert torch.equal(codec.level(codes, columns).flatten(1), codec.decode(encoded))
    assert torch.equal(codec.nearest(codec.level(codes, columns), columns), codes)
    # No other code is nearer.
    error = (codec.level(codes, columns) - grouped).abs()
    for other in range(int(codes.max()) + 1):
        there = codec.level(torch.full_like(codes, other), columns)
        assert bool((error <= (there - grouped).abs() + 1e-6).all())


@pytest.mark.parametrize("name", ["int4", "int2-zp"])
def test_a_smaller_range_has_a_smaller_step(name):
    codec, grouped = make_codec(name), weights().unflatten(1, (-1, 32))
    whole, part = codec.fit(grouped)["scale"], codec.fit(grouped, shrink=0.5)["scale"]
    # Both are rounded up to 11 bits.
    assert torch.allclose(part.float(), whole.float() / 2, rtol=2**-9)


def test_what_nesting_costs_on_gaussian_weights():
    """One group of 128 a row; the figures of the method's description (D2MoE)."""
    weight = torch.randn(4096, 128, generator=torch.Generator().manual_seed(0))

    def error(name):
        codec = make_codec(name, 128)
        return float((codec.decode(codec.encode(weight)) - weight).square().mean())

    nested = [error(name) for name in ("int2-zp", "nested3", "nested4", "nested5")]
    # Four thousand groups: the mean of their errors is known to about 1 %; figures have 2 digits.
    assert nested == pytest.approx([0.260, 0.063, 0.0155, 0.0039], rel=0.04)
    plain = [error(name) for name in ("int3-zp", "int4-zp")]
    assert plain == pytest.approx([0.046, 0.0102], rel=0.04)
