"""Router scores for a cache policy that learns from them: minus recent score (HybriMoE).

Shapes: T tokens, D width, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from numpy.typing import ArrayLike

from moekit.core.port import SeamCall
from moekit.runtime.expert_cache import ExpertCache
from moekit.runtime.native_runner import Routed
from moekit.runtime.predict.gates import Gate


class RecentScores:
    """Gives the cache the best scores of every token, summed over the tokens of a step.

    The scores are the softmax over what a layer's gate ranks its experts by.
    """

    def __init__(self, cache: ExpertCache, gates: Sequence[Gate]) -> None:
        self._cache, self._gates = cache, list(gates)

    def seam(self, call: SeamCall) -> None:
        """What happens at the seam of a model in torch."""
        hidden = call.hidden if call.router_input is None else call.router_input
        self._observe(call.layer.position, hidden.reshape(-1, hidden.shape[-1]))

    def routed(self, routed: Routed) -> None:
        """What the native runner tells of a layer."""
        self._observe(routed.layer, routed.hidden)

    @torch.no_grad()
    def _observe(self, layer: int, hidden: ArrayLike) -> None:
        gate = self._gates[layer]
        scores = gate.values(torch.as_tensor(hidden)).float().softmax(-1)
        best = scores.topk(min(scores.shape[1], round(self._cache.score.near * gate.top_k)))
        total = torch.zeros(scores.shape[1])
        total.index_add_(0, best.indices.reshape(-1), best.values.reshape(-1))
        gaining = total.nonzero()[:, 0]
        self._cache.scored(layer, gaining.numpy(), total[gaining].numpy())
