"""Synthetic recordings and traces whose routing is known."""

from __future__ import annotations

import numpy as np
import torch

from moekit.core.trace import RoutingTrace
from moekit.core.trace_files import MemoryChunk, TraceHeader, TraceLayer


def make_trace(ids, num_experts, *, lengths=None, domains=None, tokens=None) -> RoutingTrace:
    """A trace of ids [T, L, K], in one sample or those of `lengths`, each of its domain."""
    ids = np.asarray(ids)
    steps, layers, width = ids.shape
    lengths = [steps] if lengths is None else list(lengths)
    domains = [""] * len(lengths) if domains is None else list(domains)
    names = list(dict.fromkeys(domains))
    tokens = np.arange(steps) if tokens is None else np.asarray(tokens)
    header = TraceHeader(
        "synthetic",
        [TraceLayer(i, f"layers.{i}", num_experts, num_experts, width) for i in range(layers)],
        False,
        lengths,
        [names.index(name) for name in domains],
        names,
        {},
    )
    tensors = {
        "tokens": torch.as_tensor(tokens, dtype=torch.int32),
        "phase": torch.zeros(steps, dtype=torch.uint8),
    }
    for layer in range(layers):
        tensors[f"ids.{layer}"] = torch.as_tensor(ids[:, layer], dtype=torch.int16)
        tensors[f"weights.{layer}"] = torch.full((steps, width), 1 / width)
    return RoutingTrace(header, [MemoryChunk(tensors)])


def random_ids(steps, num_experts, width, layers, seed=0, preference=None):
    """Distinct experts [T, L, K]; `preference` [E] is added to the router logits."""
    noise = np.random.default_rng(seed).gumbel(size=(steps, layers, num_experts))
    if preference is not None:
        noise = noise + preference
    return np.argsort(-noise, axis=-1)[..., :width]


def sticky_ids(steps, num_experts, width, layers, keep, seed=0):
    """Sets [T, L, K] that every layer keeps from token to token with probability `keep`."""
    fresh = random_ids(steps, num_experts, width, layers, seed)
    stays = np.random.default_rng(seed + 1).random((steps, layers)) < keep
    for step in range(1, steps):
        fresh[step][stays[step]] = fresh[step - 1][stays[step]]
    return fresh
