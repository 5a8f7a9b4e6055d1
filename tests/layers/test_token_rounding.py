"""Token rounding of SonicMoE: the checks of its method section."""

import pytest
import torch

from moekit.core.errors import UserError
from moekit.layers import RouterContext, build_router
from moekit.layers.routers.token_rounding import tile_targets

D, E, K, T = 16, 4, 2, 64


def hidden() -> torch.Tensor:
    skew = torch.linspace(0, 2, D)
    return torch.randn(T, D, generator=torch.Generator().manual_seed(0)) + skew


def router(**options):
    made = build_router("token-rounding", D, E, K, **options)
    torch.nn.init.normal_(made.score.weight, std=0.3, generator=torch.Generator().manual_seed(1))
    return made


def route(training: bool = True, mask: torch.Tensor | None = None, **options):
    context = RouterContext(1, T, training=training, token_mask=mask)
    return router(**options)(hidden(), context)


def pairs(routing) -> set[tuple[int, int]]:
    return set(zip(routing.token.tolist(), routing.expert.tolist(), strict=True))


def test_targets():
    counts = torch.tensor([0, 3, 4, 6, 12, 63])
    assert tile_targets(counts, 4, "up", 64).tolist() == [0, 4, 4, 8, 12, 64]
    assert tile_targets(counts, 4, "down", 64).tolist() == [0, 0, 4, 4, 12, 60]
    # 6 / 4 is a half of a tile away from both sides: to the even number of tiles, 2.
    assert tile_targets(counts, 4, "nearest", 64).tolist() == [0, 4, 4, 8, 12, 64]
    # There are no 64 tokens among 62.
    assert tile_targets(counts, 4, "up", 62)[-1] == 60


@pytest.mark.parametrize("rounding", ["up", "down", "nearest"])
def test_a_tile_of_one_token_and_evaluation_are_plain_top_k(rounding):
    plain = route(training=False, tile=16, rounding=rounding)
    assert plain.top_k == K
    one = route(tile=1, rounding=rounding)
    assert torch.equal(one.token, plain.token)
    assert torch.equal(one.expert, plain.expert)
    assert torch.equal(one.weight, plain.weight)
    assert one.num_dropped == 0


def test_counts_are_whole_tiles_and_the_roundings_nest():
    plain = route(training=False)
    chosen = {r: route(tile=8, rounding=r) for r in ("up", "down", "nearest")}
    for name, routing in chosen.items():
        counts = routing.counts()
        assert (counts % 8 == 0).all()
        assert ((counts - plain.counts()).abs() <= (4 if name == "nearest" else 8)).all()
    assert pairs(chosen["down"]) < pairs(plain) < pairs(chosen["up"])
    lost = chosen["down"].dropped
    assert pairs(plain) - pairs(chosen["down"]) == {tuple(row) for row in lost.tolist()}


def test_the_weakest_chosen_go_and_the_strongest_others_come_with_their_plain_score():
    plain = route(training=False)
    table = torch.zeros(T, E).index_put((plain.token, plain.expert), plain.weight)
    up, down = route(tile=8, rounding="up"), route(tile=8, rounding="down")
    for expert in range(E):
        own = plain.token[plain.expert == expert]
        kept = down.token[down.expert == expert]
        gone = list(set(own.tolist()) - set(kept.tolist()))
        if gone and len(kept):
            assert table[kept, expert].min() >= table[gone, expert].max()
        added = list(set(up.token[up.expert == expert].tolist()) - set(own.tolist()))
        others = list(set(range(T)) - set(own.tolist()) - set(added))
        if added:
            assert plain.scores[added, expert].min() >= plain.scores[others, expert].max()
    original = torch.tensor(
        [pair in pairs(plain) for pair in zip(up.token.tolist(), up.expert.tolist(), strict=True)]
    )
    expected = torch.where(original, table[up.token, up.expert], up.scores[up.token, up.expert])
    assert torch.equal(up.weight, expected)
    assert not original.all()


def test_padding_fills_no_tile():
    mask = torch.arange(T) < 50
    routing = route(mask=mask, tile=8, rounding="up")
    assert mask[routing.token].all()
    assert (routing.counts() % 8 == 0).all()


def test_rows_of_padding_in_a_tiled_product():
    """Top-k pads every expert by half a tile on average; rounded counts need no padding."""
    tile, wasted = 8, []
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        ids = torch.rand(T, 16, generator=generator).topk(K, 1).indices
        counts = torch.bincount(ids.flatten(), minlength=16)
        wasted.append(float(tile_targets(counts, tile, "up", 10 * T).sub(counts).sum()))
    # E * tile / 2 = 64; counts of about 8 tokens are not uniform modulo a tile: within a tenth.
    assert sum(wasted) / len(wasted) == pytest.approx(16 * (tile - 1) / 2, rel=0.1)


def test_bad_options_are_told():
    with pytest.raises(UserError, match="tile 0"):
        router(tile=0)
    with pytest.raises(UserError, match="did you mean 'nearest'"):
        router(rounding="nearst")
