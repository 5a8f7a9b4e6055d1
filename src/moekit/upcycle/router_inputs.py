"""What a router will read: the input of a dense model's feed-forward networks, on prompts.

Shapes: D width, L layers, E experts. The router of a MoE sits where the dense network sits now, so
its real input is that of the network, behind the norm, and not the residual stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from moekit.core.errors import UserError
from moekit.core.load import load_tokenizer
from moekit.core.source_model import SourceModel
from moekit.upcycle.check_start import in_memory

POOLS = ("last", "mean")


class RouterInputs:
    """The mean input of every layer's router over a few prompts, [L, D] in float32.

    The base is held in memory for as long as this object lives. Raises `UserError` for a model
    without a tokenizer and for an empty prompt.
    """

    def __init__(self, base: SourceModel) -> None:
        self._tokenizer = load_tokenizer(base.directory)
        if self._tokenizer is None:
            raise UserError(f"{base.name} has no tokenizer, so it cannot read prompts.")
        self._model: Any = in_memory(base.config, base.tensors)

    def of_prompts(self, prompts: Sequence[str], pool: str) -> Tensor:
        """Mean over the prompts of the input at the last token, or of its mean over tokens."""
        found = [self._of_prompt(prompt, pool) for prompt in prompts]
        return torch.stack(found).mean(0)

    @torch.inference_mode()
    def _of_prompt(self, prompt: str, pool: str) -> Tensor:
        # One at a time: no padding, which would be averaged in.
        with _recorded(self._model.model.layers) as inputs:
            self._model(self._tokens(prompt))
        return torch.stack([x[-1] if pool == "last" else x.mean(0) for x in inputs])

    @torch.inference_mode()
    def of_embeddings(self, prompts: Sequence[str]) -> Tensor:
        """Mean embedding of the prompts' tokens behind the norm before every layer's network: the
        router's input if attention added nothing. Runs no layer."""
        rows = [self._model.model.embed_tokens(self._tokens(p))[0].float() for p in prompts]
        mean = torch.stack([row.mean(0) for row in rows]).mean(0)
        return torch.stack([_normed(layer, mean) for layer in self._model.model.layers])

    def _tokens(self, prompt: str) -> Tensor:
        tokens = self._tokenizer(prompt, return_tensors="pt").input_ids
        if tokens.shape[1] == 0:
            raise UserError(f"the prompt {prompt!r} has no token.")
        return torch.as_tensor(tokens)


def _normed(layer: Any, hidden: Tensor) -> Tensor:
    # Families that normalise behind the network instead read the residual stream.
    before = hasattr(layer, "input_layernorm")
    found: Tensor = layer.post_attention_layernorm(hidden) if before else hidden
    return found


@contextmanager
def _recorded(layers: Any) -> Iterator[list[Tensor]]:
    """The input [T, D] of each layer's network in the next forward pass, in order of layers."""
    found: list[Tensor] = []

    def keep(_: Any, inputs: tuple[Tensor, ...]) -> None:
        found.append(inputs[0].reshape(-1, inputs[0].shape[-1]).float())

    hooks = [layer.mlp.register_forward_pre_hook(keep) for layer in layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def rows_from_inputs(positive: Tensor, negative: Tensor | None, centre: bool) -> Tensor:
    """Router rows [E, D] from the experts' mean inputs [E, D], without training.

    Rows are the inputs minus those of negative prompts. With `centre` what all experts have in
    common is taken out, and the direction of the mean input too: without a bias it would favour one
    expert whatever the token. Rows are of unit length times a common factor that gives the logits
    of the positive inputs a standard deviation of one. A prompt alone for its expert then ranks it
    first (Cauchy and Schwarz).
    """
    rows = positive if negative is None else positive - negative
    if centre and len(rows) > 1:
        rows = rows - rows.mean(0)
        common = positive.mean(0)
        common = common / common.norm().clamp(min=torch.finfo(torch.float32).tiny)
        rows = rows - (rows @ common)[:, None] * common
    rows = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-8)
    if len(rows) < 2:
        return rows
    spread = float((positive @ rows.T).std())
    return rows / spread if spread > 0 else rows
