"""Runs a model again on the tokens of a trace, for measures that need more than routing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from moekit.analyze.reading import Piece, pieces
from moekit.core.collect import Sink, collect, pad_batches
from moekit.core.errors import UserError
from moekit.core.trace import RoutingTrace
from moekit.core.view import MoEView

BATCH = 4


def samples_of(trace: RoutingTrace, view: MoEView, max_tokens: int) -> list[tuple[list[int], str]]:
    """Token ids and domain of whole samples, cut to the model's context.

    Raises UserError where the trace has no token ids or is of another model.
    """
    check_same_model(trace, view)
    config: Any = view.model.config
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    length = min(max_tokens, context if isinstance(context, int) else max_tokens)
    tokens = trace.tokens
    chosen: list[Piece] = pieces(trace, max_tokens, length, leading=True)
    samples = [(tokens[p.start : p.stop].tolist(), p.domain) for p in chosen]
    if any(token < 0 for ids, _ in samples for token in ids):
        raise UserError("the trace has no token ids, so its text cannot be run again")
    return samples


def rerun(trace: RoutingTrace, view: MoEView, sinks: Sequence[Sink], max_tokens: int) -> int:
    """One collecting pass over samples of the trace; returns the number of tokens."""
    samples = samples_of(trace, view, max_tokens)
    collect(view, pad_batches(samples, BATCH), sinks, logits=True)
    return sum(len(ids) for ids, _ in samples)


def output_logits(
    trace: RoutingTrace, view: MoEView, max_tokens: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the model's logits [T - 1, V] and the tokens [T - 1] that follow, sample by sample."""
    device = next(view.model.parameters()).device
    for ids, _ in samples_of(trace, view, max_tokens):
        tokens = torch.tensor([ids], device=device)
        with torch.inference_mode():
            logits = view.model(input_ids=tokens, use_cache=False).logits[0, :-1]
        yield logits.float().cpu(), tokens[0, 1:].cpu()


def check_same_model(trace: RoutingTrace, view: MoEView) -> None:
    """Raise UserError unless the trace's layers are those of the model."""
    config: Any = view.model.config
    model_type = config.model_type
    if trace.header.model_type and trace.header.model_type != model_type:
        raise UserError(
            f"the trace is of a {trace.header.model_type} model, the model given is {model_type}"
        )
    traced = [(layer.index, layer.num_experts, layer.top_k) for layer in trace.layers]
    own = [(layer.index, layer.num_experts, layer.top_k) for layer in view]
    if traced == own:
        return
    if len(traced) != len(own):
        raise UserError(
            f"the trace has {len(traced)} MoE layers, the model {len(own)}: it is of another model"
        )
    place = next(i for i in range(len(own)) if own[i] != traced[i])
    raise UserError(
        "the trace is of another model: (layer, experts, top k) is "
        f"{traced[place]} in the trace and {own[place]} in the model"
    )
