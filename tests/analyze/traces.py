"""Synthetic traces whose measures are known."""

from __future__ import annotations

import itertools

import numpy as np
import torch

from moekit.core.trace import RoutingTrace
from moekit.core.trace_files import MemoryChunk, TraceHeader, TraceLayer


def make_trace(
    ids,
    num_experts,
    *,
    lengths=None,
    domains=None,
    tokens=None,
    weights=None,
    logits=None,
    step=None,
    chunk=None,
    model_type="synthetic",
) -> RoutingTrace:
    """A trace of ids [T, L, K], in one sample or those of `lengths`, each of its domain."""
    ids = np.asarray(ids)
    if ids.ndim == 2:
        ids = ids[:, None, :]
    steps, layers, width = ids.shape
    lengths = [steps] if lengths is None else list(lengths)
    domains = [""] * len(lengths) if domains is None else list(domains)
    names = list(dict.fromkeys(domains))
    tokens = np.arange(steps) if tokens is None else np.asarray(tokens)
    weights = np.full(ids.shape, 1 / width) if weights is None else np.asarray(weights)
    header = TraceHeader(
        model_type,
        [TraceLayer(i, f"layers.{i}", num_experts, num_experts, width) for i in range(layers)],
        logits is not None,
        lengths,
        [names.index(name) for name in domains],
        names,
        {} if step is None else {"step": step},
    )
    tensors = {
        "tokens": torch.as_tensor(tokens, dtype=torch.int32),
        "phase": torch.zeros(steps, dtype=torch.uint8),
    }
    for layer in range(layers):
        tensors[f"ids.{layer}"] = torch.as_tensor(ids[:, layer], dtype=torch.int16)
        tensors[f"weights.{layer}"] = torch.as_tensor(weights[:, layer], dtype=torch.float32)
        if logits is not None:
            tensors[f"logits.{layer}"] = torch.as_tensor(logits[:, layer], dtype=torch.float32)
    bounds = [*range(0, steps, chunk or max(steps, 1)), steps]
    chunks = [
        MemoryChunk({name: t[low:high] for name, t in tensors.items()})
        for low, high in itertools.pairwise(bounds)
    ]
    return RoutingTrace(header, chunks or [MemoryChunk(tensors)])


def random_ids(steps, num_experts, width, layers=1, seed=0, preference=None):
    """Distinct experts [T, L, K]; `preference` [E] or [T, L, E] is added to the router logits."""
    rng = np.random.default_rng(seed)
    noise = rng.gumbel(size=(steps, layers, num_experts))
    if preference is not None:
        noise = noise + preference
    return np.argsort(-noise, axis=-1)[..., :width]


def sticky_ids(steps, num_experts, width, keep, seed=0):
    """Top-k sets that stay as they are with probability `keep`, [T, 1, K]."""
    rng = np.random.default_rng(seed)
    rows = [rng.choice(num_experts, width, replace=False)]
    for _ in range(steps - 1):
        stays = rng.random() < keep
        rows.append(rows[-1] if stays else rng.choice(num_experts, width, replace=False))
    return np.array(rows)[:, None, :]
