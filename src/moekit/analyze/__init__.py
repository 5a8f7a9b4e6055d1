"""Measures of what routers do: pure functions of traces, each with its paper in the registry."""

from moekit.analyze.result import Result
from moekit.analyze.run import Analysis, analyze, measures
from moekit.analyze.traces import open_traces

__all__ = ["Analysis", "Result", "analyze", "measures", "open_traces"]
