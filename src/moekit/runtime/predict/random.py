"""Random experts: what a predictor must beat."""

from __future__ import annotations

import numpy as np

from moekit.core.registry import register
from moekit.core.seeds import derive_seed
from moekit.runtime.predict.predictor import Predictor, Scores


@register(
    "predictor",
    "random",
    title="Experts at random, the floor for all others",
    lossless=True,
    options={"seed": "of the random order"},
)
class RandomExperts(Predictor):
    """Scores drawn uniformly, new for every pass and layer."""

    def __init__(self, *, seed: int = 0) -> None:
        self.seed = seed

    def start(self, num_layers: int, num_experts: int, top_k: int) -> None:
        self._random = np.random.default_rng(derive_seed(self.seed, "random experts"))
        super().start(num_layers, num_experts, top_k)

    def predict(self, layer: int, ahead: int) -> Scores:
        return self._random.random(self.num_experts, dtype=np.float32)
