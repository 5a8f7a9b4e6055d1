"""How far a layer's output moves when one of its experts alone is rounded.

Shapes: T tokens, E experts, B codecs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moekit.compress.quantize.awq import round_expert
from moekit.compress.quantize.block_inputs import BlockInputs
from moekit.compress.quantize.layer_experts import middle_of, output_of
from moekit.core.layer import MoELayer
from moekit.ops.codecs import Codec

# Tokens whose errors are one Frobenius norm: a sequence of MC-MoE's calibration text.
BATCH = 2048


def rounding_errors(
    layer: MoELayer,
    codecs: Sequence[Codec],
    inputs: BlockInputs,
    *,
    reach: float = 0.0,
    batch: int = BATCH,
) -> Tensor:
    """Norms of the change of the block's output, summed over batches of tokens, [E, B].

    For each expert and each of `codecs`, whose ranges may shrink by `reach`; the other experts stay
    as they are (MC-MoE 2410.06270).
    Zero for an expert that no token chose. Raises `UserError` as `middle_of` does.
    """
    errors = torch.zeros(layer.num_experts, len(codecs), dtype=torch.float64)
    with torch.no_grad():
        for e in range(layer.num_experts):
            tokens, gates = inputs.of_expert(e)
            if not len(tokens):
                continue
            expert, hidden = layer.get_expert(e), inputs.hidden[tokens]
            plain = output_of(layer, expert, middle_of(layer, expert, hidden))
            for at, codec in enumerate(codecs):
                other = round_expert(expert, codec, reach)
                made = output_of(layer, other, middle_of(layer, other, hidden))
                # Only this expert's part of the output differs.
                squares = ((made - plain) * gates[:, None]).double().square().sum(1)
                sums = torch.zeros(len(inputs.hidden) // batch + 1, dtype=torch.float64)
                errors[e, at] = sums.index_add_(0, tokens // batch, squares).sqrt().sum()
    return errors
