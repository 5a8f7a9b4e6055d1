"""What the contract tests build: options without a default, and what a router's context needs."""

import torch

from moekit.core.registry import registry
from moekit.layers import RouterContext, build_router

WIDTH, EXPERTS, TOP_K = 16, 8, 2

# Options that a contract test must give, by router or expert type; {} where there are none.
ROUTER_OPTIONS = {
    "pipeline": {"weights": "raw"},
    "moge": {"groups": 2},
    "deepseek-v2": {"groups": 4, "keep_groups": 2},
    "deepseek-v3": {"groups": 4, "keep_groups": 2},
    "adamoe": {"null": 0},
    "token-rounding": {"tile": 2},
    "progressive-sparsity": {"until": 5, "early": [4]},
    "rexmoe": {"candidates": 4, "start": 0, "end": 5},
    "ssr": {"probability": 1.0, "differentiable": True},
}
EXPERT_OPTIONS = {
    "swiglu": {"expert_width": 24},
    "ffn": {"expert_width": 24},
    "latent": {"expert_width": 24, "group": 2},
    "low-rank": {"expert_width": 24, "latent_width": 8},
    "monet-horizontal": {"expert_width": 24},
    "monet-vertical": {"expert_width": 24},
    "segment": {"expert_width": 24, "size": 2, "whole": True, "shared": False},
    "ternary": {"expert_width": 24},
}
ROUTERS = [method.name for method in registry.methods(kind="router")]
EXPERTS_TYPES = [method.name for method in registry.methods(kind="expert")]


def router(name: str, **options):
    """A router of that name, its parameters far enough from zero for choices to differ."""
    torch.manual_seed(0)
    module = build_router(
        name, WIDTH, EXPERTS, TOP_K, **{**ROUTER_OPTIONS.get(name, {}), **options}
    )
    with torch.no_grad():
        for param in module.parameters():
            param.normal_(std=0.5)
    return module


def context(batch: int = 2, length: int = 6, **fields) -> RouterContext:
    """A context with everything that any router reads."""
    generator = torch.Generator().manual_seed(1)
    tokens = batch * length
    values = {
        "token_id": torch.randint(50, (tokens,), generator=generator),
        "token_type": torch.arange(tokens) % 2,
        "position": torch.arange(length).repeat(batch),
        "cost": torch.ones(EXPERTS),
    }
    return RouterContext(batch, length, **{**values, **fields})


def hidden(batch: int = 2, length: int = 6, seed: int = 2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch * length, WIDTH, generator=generator, dtype=dtype)
