"""Making a model smaller: methods turn statistics into an `ExpertPlan`, `convert` applies it."""

from moekit.compress.calibrate import Calibration, stats_for
from moekit.compress.fitted import rewrite_of
from moekit.compress.live import apply_live
from moekit.compress.request import experts_per_layer

__all__ = ["Calibration", "apply_live", "experts_per_layer", "rewrite_of", "stats_for"]
