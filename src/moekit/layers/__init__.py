"""MoE layers for new models: routers, experts and what joins them."""

from .build import build_bank, build_router
from .context import RouterContext
from .moe import MoELayer, SharedExpert
from .naive import naive_pool
from .pool import ExpertPool
from .router import Choice, PipelineRouter
from .routing import Pairs, Routing

__all__ = [
    "Choice",
    "ExpertPool",
    "MoELayer",
    "Pairs",
    "PipelineRouter",
    "RouterContext",
    "Routing",
    "SharedExpert",
    "build_bank",
    "build_router",
    "naive_pool",
]
