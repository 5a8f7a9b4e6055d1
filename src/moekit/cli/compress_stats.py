"""The statistics that a verb of `moekit compress` decides by: opened, or collected and kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moekit.cli.common import Dtype, check_out, open_model, progress
from moekit.core.errors import UserError

if TYPE_CHECKING:
    from moekit.compress.calibrate import Calibration
    from moekit.core.spec import MoESpec
    from moekit.core.stats import ExpertStats


def check_save(save: Path | None, calibration: Calibration | None) -> None:
    """Refuse a --save-stats that cannot be written, or has nothing to keep."""
    if save is None:
        return
    check_out(save)
    if calibration is None or not calibration.data:
        raise UserError("--save-stats keeps what is collected from --data")


def found_again(method: str, calibration: Calibration | None, save: Path | None) -> None:
    """Refuse a plan alone whose method could not read its statistics again."""
    if calibration is not None and calibration.stats is None and save is None:
        raise UserError(
            f"{method} reads the statistics again when the plan is applied: give --stats, or keep "
            "them with --save-stats DIR"
        )


def collect_stats(
    model: str,
    spec: MoESpec,
    sets: Sequence[str],
    calibration: Calibration,
    save: Path | None,
    threads: int | None,
) -> tuple[ExpertStats, str | None]:
    """The statistics of `sets`, and the directory where a plan finds them again."""
    from moekit.compress.calibrate import open_stats, stats_for

    if calibration.stats is not None:
        path = calibration.stats
        return open_stats(path, spec, sets), str(path.resolve())
    loaded = open_model(model, Dtype.auto, calibration.seed, threads)
    with progress("profile", "batches") as advance:
        collected = stats_for(loaded, calibration, sets, progress=advance)
    if save is None:
        return collected, None
    collected.save(save)
    return collected, str(save.resolve())
