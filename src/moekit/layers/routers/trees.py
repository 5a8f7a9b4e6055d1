"""Differentiable decision trees as a sparse router (COMET, KDD 2023).

Each of K soft trees ends in one expert once its splits have hardened; at the start every expert is
reached.

Letters: T tokens, E experts (leaves), K trees, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moekit.core.errors import UserError
from moekit.core.registry import register

from ..context import RouterContext
from ..routing import Routing
from ..select import ragged_choice
from ..terms import NEVER

LEAVES = "leaf_probability"
_ENTROPY_EPS = 1e-6


def smooth_step(values: Tensor, gamma: float) -> Tensor:
    """A cubic step from exactly 0 at -`gamma` / 2 to exactly 1 at `gamma` / 2."""
    inside = values.clamp(-gamma / 2, gamma / 2)
    cubic = -2 / gamma**3 * inside.pow(3) + 3 / (2 * gamma) * inside + 0.5
    # The clamp alone would leave rounding errors of the cubic where branches must be exactly cut.
    cubic = torch.where(values <= -gamma / 2, 0.0, cubic)
    return torch.where(values >= gamma / 2, 1.0, cubic)


def leaf_probabilities(left: Tensor) -> Tensor:
    """Probability of reaching each of E leaves [..., E], from that of going left [..., E - 1].

    The tree is complete and numbered as a heap: node i splits into 2i + 1 (left) and 2i + 2, and
    nodes from E - 1 on are leaves, so that any E will do.
    """
    splits = left.shape[-1]
    level = left.new_ones((*left.shape[:-1], 1))
    first, leaves = 0, []
    while level.shape[-1]:
        inner = max(0, min(level.shape[-1], splits - first))
        leaves.append(level[..., inner:])
        here = left[..., first : first + inner]
        reach = level[..., :inner]
        first += level.shape[-1]
        level = torch.stack([reach * here, reach * (1 - here)], -1).flatten(-2)
    return torch.cat(leaves, -1)


def _linear(outputs: int, width: int) -> tuple[nn.Parameter, nn.Parameter]:
    return nn.Parameter(torch.empty(outputs, width)), nn.Parameter(torch.empty(outputs))


class TreeRouter(nn.Module):
    """K trees over E experts; an expert's weight is its share of the softmax over all leaves.

    Leaf (j, l) has the logit a_jl + log p_jl, with p_jl the probability that tree j ends in leaf l
    and a_jl linear in the token. Experts that no tree reaches are not chosen. Weights sum to 1.
    `split` [K * (E - 1), D] starts near zero: all experts are reached.
    """

    causal = True
    sees_batch = False

    def __init__(self, width: int, num_experts: int, trees: int, gamma: float) -> None:
        super().__init__()
        self.num_experts, self.trees, self.gamma = num_experts, trees, gamma
        splits, leaves = trees * (num_experts - 1), trees * num_experts
        self.split, self.split_bias = _linear(splits, width)
        self.leaf, self.leaf_bias = _linear(leaves, width)
        self.init_weights_with(0.02)

    def init_weights_with(self, std: float) -> None:
        for parameter in (self.split, self.split_bias):
            nn.init.uniform_(parameter, -self.gamma / 100, self.gamma / 100)
        nn.init.normal_(self.leaf, std=std)
        nn.init.zeros_(self.leaf_bias)

    def forward(self, hidden: Tensor, context: RouterContext) -> Routing:
        """The routing of `hidden` [T, D], ragged."""
        with torch.autocast(hidden.device.type, enabled=False):
            key = (hidden if context.key is None else context.key).float()
            left = smooth_step(self._of_trees(key, self.split, self.split_bias), self.gamma)
            reach = leaf_probabilities(left)
            reached = reach > 0
            # Where a branch is cut the logarithm must neither be minus infinity nor get a gradient.
            log_reach = reach.where(reached, torch.ones_like(reach)).log()
            logits = (self._of_trees(key, self.leaf, self.leaf_bias) + log_reach).masked_fill(
                ~reached, NEVER
            )
            scores = logits.flatten(1).softmax(-1).view_as(logits).sum(1)
        unit, expert, _ = ragged_choice(scores > 0, scores)
        return Routing(
            unit,
            expert,
            scores[unit, expert],
            num_tokens=hidden.shape[0],
            num_experts=self.num_experts,
            logits=logits.logsumexp(1),
            scores=scores,
            token_mask=context.token_mask,
            cost=context.cost,
            layer=context.layer,
            extra={LEAVES: reach},
        )

    def _of_trees(self, key: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Outputs of a linear map by tree: [T, K, ...]."""
        return F.linear(key, weight.float(), bias.float()).unflatten(-1, (self.trees, -1))

    def after_step(self, counts: Tensor) -> None:
        """Nothing moves."""


@register(
    "balance",
    "leaf-entropy",
    title="Entropy of where the trees end, to bring every tree down to one expert",
    paper="COMET, KDD 2023",
    needs=("training",),
    limits="For router comet.",
)
def leaf_entropy(routing: Routing) -> Tensor:
    """Mean over tokens of the sum of the trees' entropies, in nats: 0 once all splits are hard.

    UserError for a record without trees.
    """
    if LEAVES not in routing.extra:
        raise UserError("leaf-entropy needs trees: use router 'comet'")
    reach = routing.extra[LEAVES]
    entropy = -(reach * (reach + _ENTROPY_EPS).log()).sum((1, 2))
    if routing.token_mask is not None:
        entropy = entropy[routing.token_mask]
    return entropy.mean()


@register(
    "router",
    "comet",
    title="Soft decision trees, each of which ends in one expert",
    paper="COMET, KDD 2023",
    needs=("training",),
    limits="Computes every expert at the start; leaf-entropy makes it sparse.",
    options={"gamma": "width of the smooth step of a split"},
)
def tree_router(width: int, num_experts: int, top_k: int, *, gamma: float = 10.0) -> nn.Module:
    """`TreeRouter` with `top_k` trees."""
    if num_experts < 2:
        raise UserError("router 'comet' needs two experts or more: a tree splits among them")
    if gamma <= 0:
        raise UserError(f"gamma {gamma} is not above 0")
    return TreeRouter(width, num_experts, top_k, gamma)
