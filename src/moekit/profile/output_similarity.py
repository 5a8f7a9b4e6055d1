"""How alike the experts of a layer compute: every token through every expert.

Shapes: E experts, T tokens, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moekit.core.layer import MoELayer
from moekit.profile.collector import ProfiledCall, Sums
from moekit.profile.experts_run import ExpertRows, everyone

# Outputs of all experts that are held at once.
PIECE_BYTES = 64 << 20


class OutputSimilarity:
    """Collects sums, norms and mutual products of all experts' unweighted outputs.

    The mean output (HC-SMoE) is `output_sum / output_tokens`; the cosine of two experts over all
    tokens is `output_gram[i, j] / sqrt(output_gram[i, i] * output_gram[j, j])`.
    """

    @property
    def settings(self) -> dict[str, Any]:
        """What two parts must share to be added."""
        return {}

    def bytes(self, layer: MoELayer) -> int:
        """Bytes of the statistics of one layer, nearly."""
        return 8 * layer.num_experts * (layer.num_experts + layer.router_width)

    def begin(self, call: ProfiledCall) -> None:
        pass

    def rows(self, call: ProfiledCall, rows: ExpertRows, sums: Sums) -> None:
        pass

    def end(self, call: ProfiledCall, update: Tensor, sums: Sums) -> None:
        hidden = call.unpadded(call.seam.hidden)
        experts, width = call.layer.num_experts, hidden.shape[1]
        step = max(1, PIECE_BYTES // (4 * experts * width))
        for start in range(0, len(hidden), step):
            piece = hidden[start : start + step]
            outputs = torch.zeros(experts, len(piece), width, device=piece.device)
            for rows in everyone(call.layer, piece):
                outputs[rows.expert, rows.tokens] = rows.output.float()
            flat = outputs.flatten(1).double()
            sums.add(call.position, "output_tokens", torch.tensor(len(piece)))
            sums.add(call.position, "output_sum", outputs.double().sum(1))
            sums.add(call.position, "output_norm_sum", outputs.double().norm(dim=-1).sum(1))
            sums.add(call.position, "output_gram", flat @ flat.T)
