"""The routers of the next layers, asked about the input of this one (Fate, HybriMoE)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from moekit.core.errors import UserError
from moekit.core.registry import register
from moekit.runtime.predict.gates import Gate
from moekit.runtime.predict.predictor import Predictor, Scores, any_of

Values = NDArray[np.float32]

# Margin in standard deviations of a token's values over which a choice becomes near certain.
SHARPNESS = 4.0


@register(
    "predictor",
    "next-gate",
    title="The next layers' own routers on this layer's input",
    paper="Fate 2502.12224; HybriMoE 2504.05897; Read-ME 2410.19123",
    needs=("weights",),
    lossless=True,
    limits="Nothing is predicted for the first MoE layer. Not for routers that need token ids.",
    options={"renorm": "put the later layer's norm in the place of this layer's, where known"},
)
class NextGate(Predictor):
    """Exact where the layers between add nothing to the residual stream, and for a model whose
    routes are decided before its first layer (Read-ME, 2410.19123).

    `gates` are those of the layers in order; see `gates.gates_of`.
    """

    reads_hidden = True

    def __init__(self, gates: Sequence[Gate], *, renorm: bool = True) -> None:
        self.gates, self.renorm = list(gates), renorm
        self._norms: dict[tuple[int, int], tuple[Values, Values] | None] = {}

    def start(self, num_layers: int, num_experts: int, top_k: int) -> None:
        super().start(num_layers, num_experts, top_k)
        self._check_shape(len(self.gates), num_experts)

    def begin(self, tokens: ArrayLike | None = None) -> None:
        super().begin(tokens)
        self._hidden: tuple[int, Values] | None = None

    def observe(self, layer: int, ids: ArrayLike, hidden: ArrayLike | None = None) -> None:
        super().observe(layer, ids, hidden)
        if hidden is None:
            raise UserError("next-gate predicts from hidden states, and was given none")
        rows = torch.as_tensor(hidden).detach().float().cpu().numpy()
        self._hidden = layer, rows.reshape(-1, rows.shape[-1])

    def predict(self, layer: int, ahead: int) -> Scores:
        return self.predict_all(layer, [ahead])[0]

    def predict_all(self, layer: int, aheads: Sequence[int]) -> Scores:
        scores = np.zeros((len(aheads), self.num_experts), dtype=np.float32)
        if self._hidden is None or self._hidden[0] != layer:
            return scores
        top_ks = {self.gates[layer + ahead].top_k for ahead in aheads}
        values = [self._values(layer, ahead) for ahead in aheads]
        if len(top_ks) > 1 or len({v.shape for v in values}) > 1:
            # Layers that differ are asked one by one.
            return super().predict_all(layer, aheads)
        scores[:, : values[0].shape[1]] = any_of(_certainty(np.stack(values), top_ks.pop()))
        return scores

    @torch.no_grad()
    def _values(self, layer: int, ahead: int) -> Values:
        """What the gate `ahead` ranks its experts by [T, E] on the input of `layer`."""
        assert self._hidden is not None
        hidden = self._hidden[1]
        norm = self._renorm(layer, layer + ahead)
        if norm is not None:
            hidden = hidden * norm[0] + norm[1]
        return self.gates[layer + ahead].values(torch.from_numpy(hidden)).cpu().numpy()

    def _renorm(self, layer: int, target: int) -> tuple[Values, Values] | None:
        if not self.renorm:
            return None
        if (layer, target) not in self._norms:
            found = self.gates[target].renorm(self.gates[layer])
            self._norms[layer, target] = found and (found[0].numpy(), found[1].numpy())
        return self._norms[layer, target]


def _certainty(values: Values, top_k: int) -> Values:
    """Between 0 and 1, as [..., E]: how far an expert is above or below the cut."""
    if top_k >= values.shape[-1]:
        return np.ones_like(values)
    ordered = np.sort(values, axis=-1)
    cut = (ordered[..., -top_k] + ordered[..., -top_k - 1]) / 2
    sharpness = SHARPNESS / np.maximum(values.std(axis=-1), 1e-6)
    return 1 / (1 + np.exp((cut[..., None] - values) * sharpness[..., None]))
