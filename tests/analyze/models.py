"""Tiny models with known routing facts, and traces of them."""

from __future__ import annotations

import torch
from transformers import Qwen3MoeForCausalLM

from moekit.core.collect import collect, pad_batches
from moekit.core.trace_writer import TraceWriter
from moekit.core.view import MoEView
from tests.models import tiny_config


def tiny_view(seed=0, **changes):
    """A random model of three layers with sixteen experts, unless `changes` say otherwise."""
    fields = {"num_hidden_layers": 3, "num_experts": 16, **changes}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MoEView(Qwen3MoeForCausalLM(tiny_config(**fields)).eval())


def traced(view, lengths=(40, 23, 31), domains=None, seed=1, samples=None):
    """A trace of random tokens, or of these (token ids, domain)."""
    generator = torch.Generator().manual_seed(seed)
    if samples is None:
        names = domains or [f"d{n}" for n in lengths]
        samples = [
            (torch.randint(0, 320, (n,), generator=generator).tolist(), name)
            for n, name in zip(lengths, names, strict=True)
        ]
    writer = TraceWriter()
    collect(view, pad_batches(samples, 2), [writer])
    return writer.trace
