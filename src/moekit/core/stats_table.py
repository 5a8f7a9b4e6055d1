"""What `ExpertStats` can hold: every statistic with its shape, its number format and how it adds.

Shape letters: G domains, C choices (the experts, and choices that run no expert), P choices of the
MoE layer before, E experts, M moments, B bins, D width of the experts' input, F expert width,
H width of the residual stream, S sampled tokens, K choices of a token, N numbers of a neuron.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch


class Moment(NamedTuple):
    """Exponents of one saliency sum: gate^gate * norm^norm * contribution^contribution."""

    gate: int = 0
    norm: int = 0
    contribution: int = 0


# EAN is (0, 1), its square (0, 2), DERN and gate mass (1, 0), REAP (1, 1), EASY-EP (1, 1, 1).
DEFAULT_MOMENTS = (
    Moment(1, 0),
    Moment(2, 0),
    Moment(0, 1),
    Moment(0, 2),
    Moment(1, 1),
    Moment(2, 2),
    Moment(1, 1, 1),
)
RATIO_BINS = 256


@dataclass(frozen=True)
class Statistic:
    """One statistic of one layer: axes by letter, number format, how two parts combine."""

    axes: str
    dtype: torch.dtype
    meaning: str
    combine: Literal["sum", "max", "concat"] = "sum"
    heavy: bool = False


_INT, _FLOAT, _MAX = torch.int64, torch.float64, torch.float32

STATISTICS = {
    "tokens": Statistic("G", _INT, "tokens that passed the layer, without padding"),
    "count": Statistic("GC", _INT, "tokens that chose the expert"),
    "moments": Statistic("GCM", _FLOAT, "sums of gate^p * norm^q * contribution^s, routed tokens"),
    "output_max": Statistic("C", _MAX, "largest |output| before the gate weight", "max"),
    "middle_max": Statistic("E", _MAX, "largest |input| of the down projection", "max"),
    "weight_ratio": Statistic("B", _INT, "tokens by second over first gate weight, bins of [0, 1]"),
    "coactivation": Statistic("CC", _INT, "tokens that chose both experts; diagonal: chose it"),
    "transitions": Statistic("PC", _INT, "tokens by choice in the MoE layer before and in this"),
    "logit_sum": Statistic("GC", _FLOAT, "router logits, all tokens"),
    "softmax_sum": Statistic("GC", _FLOAT, "softmax of the router logits, all tokens"),
    "chosen_softmax_sum": Statistic("GC", _FLOAT, "the same softmax, tokens that chose the expert"),
    "logit_gram": Statistic("CC", _FLOAT, "products of the router logits of two experts"),
    "top_logit_sum": Statistic("GC", _FLOAT, "logits of the tokens whose largest logit this is"),
    "top_logit_count": Statistic("GC", _INT, "tokens whose largest logit this is"),
    "kept_logit_sum": Statistic("GC", _FLOAT, "top-k logits whose softmax among them is kept"),
    "input_max": Statistic("D", _MAX, "largest |input| of the experts by channel", "max"),
    "input_abs_sum": Statistic("D", _FLOAT, "|input| of the experts by channel"),
    "residual_max": Statistic("H", _MAX, "largest |residual stream| by channel", "max"),
    "residual_sq_sum": Statistic("H", _FLOAT, "squares of the residual stream by channel"),
    "moment_tokens": Statistic("E", _INT, "tokens in the input moments below", heavy=True),
    "input_sq": Statistic("ED", _FLOAT, "squares of the input", heavy=True),
    "input_abs": Statistic("ED", _FLOAT, "absolute input", heavy=True),
    "input_peak": Statistic("ED", _MAX, "largest |input|", "max", heavy=True),
    "gated_input_sq": Statistic("ED", _FLOAT, "squares of gate times input", heavy=True),
    "middle_sq": Statistic("EF", _FLOAT, "squares of the down projection's input", heavy=True),
    "middle_abs": Statistic("EF", _FLOAT, "absolute input of the down projection", heavy=True),
    "middle_peak": Statistic("EF", _MAX, "largest |input| of the down projection", "max", True),
    "gated_middle_sq": Statistic("EF", _FLOAT, "squares of gate times down's input", heavy=True),
    "input_second": Statistic("EDD", torch.float32, "products of two inputs", heavy=True),
    "middle_second": Statistic("EFF", torch.float32, "products of two inputs of down", heavy=True),
    "output_tokens": Statistic("", _INT, "tokens that went through all experts", heavy=True),
    "output_sum": Statistic("ED", _FLOAT, "outputs over all tokens, unweighted", heavy=True),
    "output_norm_sum": Statistic("E", _FLOAT, "norms of the outputs over all tokens", heavy=True),
    "output_gram": Statistic(
        "EE", _FLOAT, "products of two experts' outputs, all tokens", "sum", True
    ),
    "sample_hidden": Statistic("SD", _MAX, "inputs of a sample of tokens", "concat", True),
    "sample_ids": Statistic("SK", _INT, "experts those tokens chose", "concat", True),
    "sample_weights": Statistic("SK", _MAX, "gate weights those tokens gave", "concat", True),
    "fisher_sequences": Statistic("", _INT, "sequences in the information below", heavy=True),
    "neuron_fisher": Statistic("EFN", _MAX, "squared gradients of the log-likelihood", heavy=True),
}
