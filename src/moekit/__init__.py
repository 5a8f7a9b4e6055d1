"""moekit: one toolkit for the whole life of a Mixture-of-Experts model."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moekit.core.checkpoint import Checkpoint
    from moekit.core.collect import collect
    from moekit.core.errors import UserError
    from moekit.core.load import LanguageModel, LoadedModel, load, load_language_model
    from moekit.core.plan import ExpertPlan
    from moekit.core.registry import register
    from moekit.core.spec import MoESpec
    from moekit.core.trace import RoutingTrace
    from moekit.core.view import MoEView
    from moekit.runtime.engine import Engine
    from moekit.runtime.open import open_engine

__version__ = "0.1.0"

# Imported when first used: torch takes seconds, and the command line must answer at once.
_HOMES = {
    "Checkpoint": "core.checkpoint",
    "Engine": "runtime.engine",
    "ExpertPlan": "core.plan",
    "LanguageModel": "core.load",
    "LoadedModel": "core.load",
    "MoESpec": "core.spec",
    "MoEView": "core.view",
    "RoutingTrace": "core.trace",
    "UserError": "core.errors",
    "collect": "core.collect",
    "load": "core.load",
    "load_language_model": "core.load",
    "open_engine": "runtime.open",
    "register": "core.registry",
}

__all__ = [
    "Checkpoint",
    "Engine",
    "ExpertPlan",
    "LanguageModel",
    "LoadedModel",
    "MoESpec",
    "MoEView",
    "RoutingTrace",
    "UserError",
    "collect",
    "load",
    "load_language_model",
    "open_engine",
    "register",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'moekit' has no attribute {name!r}")
    return getattr(import_module(f"moekit.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
