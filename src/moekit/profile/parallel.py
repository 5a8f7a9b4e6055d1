"""Data-parallel profiling under torchrun: every process takes its share of the batches.

The parts are merged in the order of the ranks from files, so the result is exactly that of merging
the same parts by hand, and large statistics never meet in memory.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch.distributed as dist

from moekit.core.collect import Batch
from moekit.core.errors import UserError
from moekit.core.stats import ExpertStats, merge_all


def world() -> tuple[int, int]:
    """(rank, number of processes) of the torchrun that this process belongs to, or (0, 1)."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return dist.get_rank(), dist.get_world_size()


def share_of(batches: list[Batch], rank: int, size: int) -> list[Batch]:
    """The batches of one process; raises UserError where some process would have none."""
    if len(batches) < size:
        raise UserError(
            f"{len(batches)} batches cannot be shared by {size} processes; use more text, a "
            "smaller --batch-size, or fewer processes."
        )
    return batches[rank::size]


def reduce_stats(stats: ExpertStats, out: Path, rank: int, size: int) -> ExpertStats | None:
    """Merge the parts of all processes by way of directories beside `out`.

    Returns the whole in process 0, whose files `discard_parts` removes once it is saved, and None
    elsewhere. All processes must see the same file system.
    """
    part = _part(out, rank)
    if part.exists():
        shutil.rmtree(part)
    stats.save(part)
    dist.barrier()
    if rank:
        return None
    missing = [p.name for p in (_part(out, r) for r in range(size)) if not p.is_dir()]
    if missing:
        raise UserError(
            f"{missing[0]} is not in {out.absolute().parent}: the processes must share a file "
            "system to bring their statistics together."
        )
    return merge_all(ExpertStats.open(_part(out, r)) for r in range(size))


def discard_parts(out: Path, size: int) -> None:
    """Remove the directories that `reduce_stats` made."""
    for rank in range(size):
        shutil.rmtree(_part(out, rank), ignore_errors=True)


def _part(out: Path, rank: int) -> Path:
    return out.with_name(f"{out.name}.rank-{rank}")
