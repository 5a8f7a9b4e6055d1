"""GPTQ: the Checks of the method, against the inverse taken anew at every column.

O rows, I columns, n tokens.
"""

import pytest
import torch

from moekit.core.errors import UserError
from moekit.ops.codecs import Encoded, make_codec
from moekit.ops.codecs.range_search import searched_fit
from moekit.ops.gptq import gptq, gptq_encode, gptq_naive, inverse_factor, proxy_loss

GRIDS = [
    "int8",
    "int4",
    "int4-zp",
    "int3",
    "int2",
    "int2-zp",
    "binary",
    "ternary",
    "ternary-zp",
    "ternary-rows",
]


def weights(rows=16, columns=96, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def correlated(columns=96, tokens=300, seed=1):
    """Inputs [n, I] of which each mixes a few common directions."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns // 4, columns, generator=generator)
    x = torch.randn(tokens, columns // 4, generator=generator) @ mix
    return x + 0.3 * torch.randn(tokens, columns, generator=generator)


def decoded(codec, codes, grid):
    plane = codec.pack(codes.unflatten(1, (-1, codec.group_size or 96)), grid)
    return codec.decode(Encoded(tuple(codes.shape), (plane,)))


def encode(weight, hessian, codec, **options):
    (made,) = gptq_encode(weight[None], hessian[None], codec, **options)
    return made


@pytest.mark.parametrize("name", [*GRIDS, "nested4"])
@pytest.mark.parametrize("act_order", [False, True])
def test_uncorrelated_inputs_of_one_size_give_rounding_to_nearest(name, act_order):
    codec, weight = make_codec(name), weights()
    made = encode(weight, 0.7 * torch.eye(96), codec, act_order=act_order, block=32)
    plain = codec.encode(weight)
    assert all(
        torch.equal(a[n], b[n]) for a, b in zip(made.planes, plain.planes, strict=True) for n in b
    )


@pytest.mark.parametrize("name", ["int4", "int3-zp", "int2-zp", "ternary"])
def test_blocks_equal_the_derivation(name):
    codec, weight, x = make_codec(name), weights(), correlated()
    hessian = x.T @ x
    slow_codes, slow_grid = gptq_naive(weight, hessian, codec)
    expected = decoded(codec, slow_codes, slow_grid)
    for block in (32, 64, 128):
        codes, grid = gptq(weight, hessian, codec, act_order=False, block=block)
        # Float32 against float64: a weight near the middle between two levels may fall either way
        # and changes those after it, so the same loss is asked for and nearly all codes.
        assert (codes == slow_codes).float().mean() > 0.97
        loss = proxy_loss(decoded(codec, codes, grid) - weight, hessian)
        assert loss == pytest.approx(float(proxy_loss(expected - weight, hessian)), rel=0.03)


@pytest.mark.parametrize("name", [*GRIDS, "nested4"])
def test_correlated_inputs_are_served_better_than_by_rounding(name):
    codec, weight, x = make_codec(name), weights(), correlated()
    hessian = x.T @ x
    plain = proxy_loss(codec.decode(codec.encode(weight)) - weight, hessian)
    made = codec.decode(encode(weight, hessian, codec, block=32))
    loss = proxy_loss(made - weight, hessian)
    assert loss == pytest.approx(float((x.double() @ (made - weight).double().T).square().sum()))
    assert loss < 0.9 * plain


def test_batches_equal_one_by_one():
    codec = make_codec("int4-zp")
    weight = torch.stack([weights(seed=s) for s in range(5)])
    inputs = [correlated(seed=s) for s in range(5)]
    hessian = torch.stack([x.T @ x for x in inputs])
    for act_order in (False, True):
        codes, grid = gptq(weight, hessian, codec, act_order=act_order)
        for i in range(5):
            alone, alone_grid = gptq(weight[i], hessian[i], codec, act_order=act_order)
            assert torch.equal(alone, codes[i])
            assert all(torch.equal(alone_grid[n], grid[n][i]) for n in grid)


def test_encoded_batches_are_packed_one_by_one():
    codec, x = make_codec("int3-zp"), correlated()
    weight = torch.stack([weights(seed=s) for s in range(3)])
    hessian = torch.stack([x.T @ x, torch.eye(96), x[:50].T @ x[:50]])
    for at, made in enumerate(gptq_encode(weight, hessian, codec)):
        alone = encode(weight[at], hessian[at], codec)
        assert all(
            torch.equal(made.planes[0][name], array) for name, array in alone.planes[0].items()
        )


def test_a_hessian_that_cannot_be_factorised_means_rounding():
    codec, weight = make_codec("int4"), weights()
    broken = -torch.eye(96)
    assert torch.equal(inverse_factor(broken), torch.eye(96, dtype=torch.float64))
    x = correlated()
    both = torch.stack([broken, x.T @ x])
    codes, grid = gptq(torch.stack([weight, weight]), both, codec)
    plain = codec.decode(codec.encode(weight))
    assert torch.equal(decoded(codec, codes[0], {n: v[0] for n, v in grid.items()}), plain)
    assert not torch.equal(codes[0], codes[1])


def test_columns_without_input_become_zero():
    codec, weight, x = make_codec("int4"), weights(), correlated()
    x[:, [3, 50]] = 0
    made = codec.decode(encode(weight, x.T @ x, codec))
    assert bool((made[:, [3, 50]] == 0).all())
    assert bool((made[:, [2, 51]] != 0).any())


def test_the_factor_is_that_of_the_inverse():
    x = correlated()
    hessian = (x.T @ x).double()
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(96)
    factor = inverse_factor(hessian)
    assert torch.equal(factor, factor.triu())
    assert torch.allclose(factor.T @ factor @ damped, torch.eye(96, dtype=torch.float64), atol=1e-8)


def test_the_nested_prefix_stays_valid():
    codec, weight, x = make_codec("nested4"), weights(), correlated()
    made = encode(weight, x.T @ x, codec, block=32)
    losses = [float(proxy_loss(codec.decode(made.prefix(p)) - weight, x.T @ x)) for p in (1, 2, 3)]
    assert losses[0] > losses[1] > losses[2]


def test_widths_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="80 columns"):
        gptq(torch.zeros(4, 80), torch.eye(80), make_codec("int4"))


@pytest.mark.parametrize("name", ["int4", "int2-zp", "binary"])
def test_range_search_lowers_its_norm(name):
    codec, grouped = make_codec(name), weights().unflatten(1, (-1, 32))

    def loss(grid):
        columns = {n: v[..., None] for n, v in grid.items()}
        error = codec.level(codec.nearest(grouped, columns), columns) - grouped
        return (error.abs() ** 2.4).sum(-1)

    plain, found = loss(codec.fit(grouped)), loss(searched_fit(codec, grouped, reach=0.5))
    assert bool((found <= plain).all())
    assert codec.can_shrink == bool((found < plain).any())
    assert torch.equal(plain, loss(searched_fit(codec, grouped, reach=0)))


def test_columns_that_matter_decide_the_range():
    codec = make_codec("int2-zp")
    grouped = torch.full((1, 32), 0.02)
    grouped[0, 0] = 1.0
    small = searched_fit(codec, grouped, reach=0.97, importance=torch.tensor([1e-6] + [1.0] * 31))
    large = searched_fit(codec, grouped, reach=0.97, importance=torch.tensor([1.0] + [1e-6] * 31))
    assert small["scale"] < large["scale"] / 5
