"""Token rounding: every expert gets whole tiles of tokens (SonicMoE, arXiv:2512.14080).

Letters: T tokens, E experts, K chosen experts, N pairs (token, expert).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from moekit.core.errors import UserError
from moekit.core.registry import register

from ..context import RouterContext
from ..names import one_of
from ..router import PartList
from ..routing import Routing
from ..select import ragged_choice
from ..weigh import WEIGHTS
from .pipeline import pipeline_router

ROUNDINGS = ("up", "down", "nearest")


def tile_targets(counts: Tensor, tile: int, rounding: str, num_tokens: int) -> Tensor:
    """The multiple of `tile` that each of `counts` [E] is rounded to, at most `num_tokens`.

    `rounding` is one of ROUNDINGS; "nearest" sends a half to the even number of tiles. An expert
    cannot take more tokens than there are, hence the largest target is the whole tiles in
    `num_tokens`.
    """
    tiles = counts.double() / tile
    rounded = {"up": tiles.ceil, "down": tiles.floor, "nearest": tiles.round}[rounding]()
    return (rounded.long() * tile).clamp(max=num_tokens // tile * tile)


class TileRounding(nn.Module):
    """In training, adds and removes pairs until every expert has a multiple of `tile` tokens.

    An expert's chosen tokens come before the others, each part by descending score: rounding down
    drops the weakest chosen ones, rounding up adds the strongest others with their plain score as
    weight. Nothing is normalised again, so a token may end with none or with all experts. Padding
    is left out. Outside of training the routing stays as it is.
    """

    def __init__(self, tile: int, rounding: str) -> None:
        super().__init__()
        self.tile, self.rounding = tile, rounding

    @property
    def causal(self) -> bool:
        return not self.training

    @property
    def sees_batch(self) -> bool:
        return self.training

    def forward(self, routing: Routing, context: RouterContext) -> Routing:
        if not context.training:
            return routing
        assert routing.scores is not None
        scores = routing.scores
        ids, weights = routing.topk()
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(1, ids, True)
        table = scores.scatter(1, ids, weights)
        # Weights are not negative and -1/score is, so chosen tokens lead; unlike score - 1 the
        # reciprocal keeps small scores apart in single precision.
        key = torch.where(chosen, table, -scores.reciprocal()).detach()
        num_tokens = routing.num_tokens
        if routing.token_mask is not None:
            chosen = chosen & routing.token_mask[:, None]
            key = key.masked_fill(~routing.token_mask[:, None], -torch.inf)
            num_tokens = int(routing.token_mask.sum())
        targets = tile_targets(chosen.sum(0), self.tile, self.rounding, num_tokens)
        keep = _rank_in_column(key) < targets
        choice = ragged_choice(keep, key)
        return replace(
            routing,
            token=choice.unit,
            expert=choice.expert,
            weight=table[choice.unit, choice.expert],
            top_k=None,
            dropped=(chosen & ~keep).nonzero(),
        )


def _rank_in_column(key: Tensor) -> Tensor:
    """How many rows of the same column come before, by descending `key` [T, E]."""
    order = key.sort(dim=0, descending=True, stable=True).indices
    place = torch.arange(key.shape[0], device=key.device)[:, None].expand_as(order)
    return torch.empty_like(order).scatter_(0, order, place)


@register(
    "router",
    "token-rounding",
    title="Top-k whose tokens per expert are rounded to whole tiles of the matrix product",
    paper="SonicMoE, arXiv:2512.14080",
    needs=("training",),
    limits="Not causal in training; at inference plain top-k. Wants two tiles an expert or more.",
    options={
        "tile": "rows of a tile of the grouped matrix product",
        "rounding": f"to which multiple of tile: {', '.join(ROUNDINGS)}",
        "weights": f"weights of the chosen experts: {' or '.join(WEIGHTS)}",
        "bias_rate": "step of the loss-free bias; 0: no bias",
    },
)
def token_rounding_router(
    width: int,
    num_experts: int,
    top_k: int,
    *,
    tile: int = 128,
    rounding: str = "nearest",
    weights: str = "renormalised",
    bias_rate: float = 0.0,
) -> nn.Module:
    """Top-k of a softmax with `TileRounding`; `tile` 1 is plain top-k."""
    one_of("rounding", rounding, ROUNDINGS)
    if tile < 1:
        raise UserError(f"tile {tile} is below 1")
    router = pipeline_router(width, num_experts, top_k, weights=weights, bias_rate=bias_rate)
    router.edits = PartList([TileRounding(tile, rounding)])
    return router
