"""Tiny models wide enough for a group, with the stats that quantizers read."""

from __future__ import annotations

import functools

import torch
from transformers import PreTrainedModel

from moekit.core.collect import Batch
from moekit.core.spec import MoESpec, spec_of
from moekit.core.stats import ExpertStats
from moekit.core.view import MoEView
from moekit.profile import align_weights, profile
from tests.families.tiny import TINY, model_class
from tests.models import tiny_config

SETS = ("default", "full", "inputs")


def wide_model(family: str = "qwen3_moe") -> PreTrainedModel:
    """A tiny model of a family whose experts have widths that split into groups of 32."""
    if family == "qwen3_moe":
        config = tiny_config(hidden_size=64, moe_intermediate_size=32, num_experts=8)
    else:
        config = TINY[family]()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(family)(config) if family != "qwen3_moe" else _qwen(config)
    return model.eval()


def _qwen(config: object) -> PreTrainedModel:
    from transformers import Qwen3MoeForCausalLM

    return Qwen3MoeForCausalLM(config)  # type: ignore[arg-type]


def batches(count: int = 6, length: int = 48) -> list[Batch]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(5)
    return [Batch(torch.randint(3, 300, (4, length), generator=generator)) for _ in range(count)]


@functools.cache
def profiled() -> tuple[PreTrainedModel, MoESpec, ExpertStats]:
    """The model, its spec and its stats; nothing may change the model for good."""
    model = wide_model()
    align_weights(model)
    stats = profile(MoEView(model), batches(), sets=SETS)
    return model, spec_of(model), stats
