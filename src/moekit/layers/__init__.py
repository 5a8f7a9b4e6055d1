"""MoE layers for new models: routers, experts and what joins them.

Importing it makes models of type "moekit" known to AutoConfig and AutoModelForCausalLM.
"""

from .build import build_bank, build_router
from .config import MoekitConfig
from .context import RouterContext
from .model import MoekitForCausalLM
from .moe import MoELayer, SharedExpert
from .naive import naive_pool
from .pool import ExpertPool
from .router import Choice, PipelineRouter
from .routing import Pairs, Routing

__all__ = [
    "Choice",
    "ExpertPool",
    "MoELayer",
    "MoekitConfig",
    "MoekitForCausalLM",
    "Pairs",
    "PipelineRouter",
    "RouterContext",
    "Routing",
    "SharedExpert",
    "build_bank",
    "build_router",
    "naive_pool",
]
