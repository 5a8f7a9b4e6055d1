"""Filling `ExpertStats` from one pass over text, in memory or layer by layer from disk."""

from moekit.profile.align import align_weights
from moekit.profile.pass_ import SETS, profile
from moekit.profile.shortfall import Shortfall, shortfalls
from moekit.profile.stream import StreamedModel

__all__ = ["SETS", "Shortfall", "StreamedModel", "align_weights", "profile", "shortfalls"]
