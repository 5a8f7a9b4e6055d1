"""moekit: one toolkit for the whole life of a Mixture-of-Experts model."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moekit.core.checkpoint import Checkpoint
    from moekit.core.collect import collect
    from moekit.core.errors import UserError
    from moekit.core.load import LoadedModel, load
    from moekit.core.plan import ExpertPlan
    from moekit.core.registry import register
    from moekit.core.spec import MoESpec
    from moekit.core.trace import RoutingTrace
    from moekit.core.view import MoEView

__version__ = "0.1.0"

# Imported when first used: torch takes seconds, and the command line must answer at once.
_HOMES = {
    "Checkpoint": "checkpoint",
    "ExpertPlan": "plan",
    "LoadedModel": "load",
    "MoESpec": "spec",
    "MoEView": "view",
    "RoutingTrace": "trace",
    "UserError": "errors",
    "collect": "collect",
    "load": "load",
    "register": "registry",
}

__all__ = [
    "Checkpoint",
    "ExpertPlan",
    "LoadedModel",
    "MoESpec",
    "MoEView",
    "RoutingTrace",
    "UserError",
    "collect",
    "load",
    "register",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'moekit' has no attribute {name!r}")
    return getattr(import_module(f"moekit.core.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
