"""What the statistics hold of single experts: moments of their inputs, and sampled inputs.

Shapes: D width, F expert width, n tokens of one expert.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from moekit.compress.quantize.block_inputs import BlockInputs
from moekit.core.architecture import meta_model, read_config
from moekit.core.layer import MoELayer
from moekit.core.stats import ExpertStats
from moekit.core.view import MoEView


class ExpertMoments:
    """The input moments of single experts, by decoder layer."""

    def __init__(self, stats: ExpertStats) -> None:
        self._stats = stats
        self._position = {layer.index: at for at, layer in enumerate(stats.layers)}
        self._pooled: tuple[int, Tensor] | None = None

    def counts(self) -> list[tuple[int, int, int]]:
        """(decoder layer, expert, tokens) of every expert."""
        return [
            (layer, expert, tokens)
            for layer, at in self._position.items()
            for expert, tokens in enumerate(self._stats.get(at, "moment_tokens").tolist())
        ]

    def num_experts(self, layer: int) -> int:
        return self._stats.layers[self._position[layer]].num_experts

    def bytes_per_expert(self, layer: int) -> int:
        """Bytes of the two moments of an expert in float64, in which they are factorised."""
        moments = (self.input(layer, 0), self.middle(layer, 0))
        return sum(8 * moment.numel() for moment in moments)

    def input(self, layer: int, expert: int) -> Tensor:
        return self._stats.of_expert(self._position[layer], "input_second", expert)

    def middle(self, layer: int, expert: int) -> Tensor:
        return self._stats.of_expert(self._position[layer], "middle_second", expert)

    def pooled_input(self, layer: int) -> Tensor:
        """The moment of the layer's tokens, each counted once for each expert that it is in."""
        if self._pooled is None or self._pooled[0] != layer:
            total = self.input(layer, 0).clone()
            for expert in range(1, self.num_experts(layer)):
                total += self.input(layer, expert)
            self._pooled = layer, total
        return self._pooled[1]


class ExpertSamples:
    """The sampled inputs of single experts, and what runs them: a model without weights."""

    def __init__(self, stats: ExpertStats, model: Path) -> None:
        self._stats = stats
        self._position = {layer.index: at for at, layer in enumerate(stats.layers)}
        self._view = MoEView(meta_model(read_config(model)))
        self._held: tuple[int, BlockInputs] | None = None

    def counts(self) -> list[tuple[int, int, int]]:
        """(decoder layer, expert, sampled tokens) of every expert."""
        return [
            (layer, expert, int((ids == expert).sum()))
            for layer, at in self._position.items()
            for ids in (self._stats.get(at, "sample_ids"),)
            for expert in range(self._stats.layers[at].num_experts)
        ]

    def of_expert(self, layer: int, expert: int) -> tuple[MoELayer, Tensor, Tensor]:
        """The layer's module, and hidden [n, D] and gates [n] of the expert's tokens."""
        at = self._position[layer]
        if self._held is None or self._held[0] != layer:
            self._held = layer, BlockInputs.of(self._stats, at)
        tokens, gates = self._held[1].of_expert(expert)
        return self._view[at], self._held[1].hidden[tokens], gates
