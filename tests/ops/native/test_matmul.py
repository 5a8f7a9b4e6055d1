"""Every codec's kernels against decoding and then multiplying.

O rows, I columns, T tokens.
"""

import pytest
import torch

from moekit.core.registry import registry
from moekit.ops import native
from moekit.ops.codecs import make_codec
from moekit.ops.native import formats
from tests.ops.native.activations import seen

NAMES = [method.name for method in registry.methods(kind="codec")]
WITHOUT_KERNELS = {"ternary-rows"}.intersection(NAMES)
PLAIN = ("fp32", "bf16", "fp16")
WITH_GROUPS = [name for name in NAMES if name not in {*PLAIN, *WITHOUT_KERNELS}]
EVERY = [(name, 32) for name in PLAIN] + [(n, g) for n in WITH_GROUPS for g in (32, 64, 128)]
# A tile is 64 rows, a strip of it 16; row-major kernels take 8 rows and 32 columns at a time.
SHAPES = [(64, 256), (128, 384), (35, 128), (1, 128), (200, 128)]
# Blocks of 12 tokens, of 3 where matrices are row-major.
TOKENS = (1, 2, 3, 4, 7, 12, 13, 30)


def random(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def check(out, x, weight):
    """Float32 sums in any order: each addition rounds by at most 2**-24 of what was added so far.

    Zero points and nested planes add values that are larger than the weights they make, by a few
    times; that is within the bound, which no sum of hundreds of random errors reaches.
    """
    exact = x.double() @ weight.double().T
    bound = x.double().abs() @ weight.double().abs().T
    assert bool(((out - exact).abs() <= bound * x.shape[1] * 2**-24).all())


def test_which_codecs_have_kernels():
    codecs = {name: make_codec(name) for name in NAMES}
    without = {
        n for n, c in codecs.items() if formats.in_memory(c, c.encode(random(2, 64))) is None
    }
    assert without == WITHOUT_KERNELS


@pytest.mark.parametrize(("name", "group_size"), EVERY)
def test_product(pool, name, group_size):
    codec = make_codec(name, group_size)
    for rows, columns in SHAPES:
        encoded = codec.encode(random(rows, columns, seed=rows, scale=0.05))
        matrix, memory = formats.in_memory(codec, encoded)
        for tokens in TOKENS:
            x = random(tokens, columns, seed=tokens)
            out = pool.matmul(matrix, memory.data_ptr(), x)
            check(out, seen(pool, codec, x), codec.decode(encoded))


@pytest.mark.parametrize("name", [*PLAIN, *WITH_GROUPS])
def test_product_is_that_of_the_codec(pool, name):
    """The contract of every codec. Activations are rounded before, so that nothing is twice."""
    codec = make_codec(name)
    encoded = codec.encode(random(96, 256, scale=0.05))
    matrix, memory = formats.in_memory(codec, encoded)
    x = seen(pool, codec, random(5, 256))
    out, expected = pool.matmul(matrix, memory.data_ptr(), x), codec.matmul(x, encoded)
    # Two float32 sums, each as far from the exact one as `check` allows.
    assert torch.allclose(out, expected, rtol=0, atol=2 * 256 * 2**-24 * float(256 * 0.05))


@pytest.mark.parametrize("planes", [1, 2, 3])
def test_fewer_planes(pool, planes):
    codec = make_codec("nested4")
    encoded = codec.encode(random(64, 128)).prefix(planes)
    matrix, memory = formats.in_memory(codec, encoded)
    x = random(3, 128)
    out = pool.matmul(matrix, memory.data_ptr(), x)
    check(out, seen(pool, codec, x), codec.decode(encoded))


@pytest.mark.parametrize("columns", [8, 24, 40, 100])
@pytest.mark.parametrize("name", sorted(PLAIN))
def test_columns_that_fill_no_vector(pool, name, columns):
    codec = make_codec(name)
    encoded = codec.encode(random(19, columns))
    matrix, memory = formats.in_memory(codec, encoded)
    for tokens in (1, 5):
        x = random(tokens, columns)
        check(
            pool.matmul(matrix, memory.data_ptr(), x), seen(pool, codec, x), codec.decode(encoded)
        )


@pytest.mark.parametrize("name", ["int4", "int8-zp", "nested4", "ternary", "bf16", "fp32"])
def test_a_token_does_not_depend_on_the_others_nor_on_threads(kernels, name):
    codec = make_codec(name)
    matrix, memory = formats.in_memory(codec, codec.encode(random(200, 256)))
    x = random(30, 256)
    results = []
    for threads in (1, 2, 4):
        pool = native.Pool(kernels, threads)
        alone = [pool.matmul(matrix, memory.data_ptr(), row[None]) for row in x]
        results += [pool.matmul(matrix, memory.data_ptr(), x), torch.cat(alone)]
        results.append(torch.cat([pool.matmul(matrix, memory.data_ptr(), p) for p in x.split(7)]))
        pool.close()
    assert all(torch.equal(result, results[0]) for result in results)


def test_several_matrices_at_once(pool):
    x = random(6, 128)
    made = []
    for name, rows in (("int4", 64), ("int4", 32), ("int3", 64), ("bf16", 10), ("fp32", 7)):
        codec = make_codec(name)
        made.append(formats.in_memory(codec, codec.encode(random(rows, 128))))
    outs = pool.matmuls([(matrix, memory.data_ptr()) for matrix, memory in made], x)
    for (matrix, memory), out in zip(made, outs, strict=True):
        assert torch.equal(out, pool.matmul(matrix, memory.data_ptr(), x))


def test_values_at_the_limits(pool):
    """Scales below the normal float16, weights of zero, activations that vanish in bfloat16."""
    for name, scale in (("int4", 1e-6), ("int8-zp", 1e-6), ("int4", 0.0), ("fp16", 1e-6)):
        codec = make_codec(name)
        encoded = codec.encode(random(16, 64, scale=scale))
        matrix, memory = formats.in_memory(codec, encoded)
        x = random(2, 64)
        x[:, ::5] = 0
        x[:, 1::5] *= 1e-30
        check(
            pool.matmul(matrix, memory.data_ptr(), x), seen(pool, codec, x), codec.decode(encoded)
        )


@pytest.mark.parametrize("name", ["int4", "int8", "ternary", "bf16", "fp16", "fp32"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so(pool, name, value):
    codec = make_codec(name)
    matrix, memory = formats.in_memory(codec, codec.encode(random(64, 128)))
    x = random(2, 128)
    x[1, 70] = value
    out = pool.matmul(matrix, memory.data_ptr(), x)
    assert bool(out[0].isfinite().all())
    # Infinity times a code of zero is NaN, times others it may be infinite.
    assert not bool(out[1].isfinite().any())


def test_shapes_that_do_not_fit_are_refused(pool):
    codec = make_codec("int4")
    matrix, memory = formats.in_memory(codec, codec.encode(random(64, 128)))
    with pytest.raises(ValueError, match=r"do not fit a matrix \[64, 128\]"):
        pool.matmul(matrix, memory.data_ptr(), random(2, 64))
    with pytest.raises(ValueError, match="do not fit"):
        pool.matmul(matrix, memory.data_ptr(), random(2, 128), torch.empty(2, 63))
