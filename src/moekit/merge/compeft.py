"""Compressing a fine-tune to a ternary task vector over its base (ComPEFT 2311.13171).

A share of the largest entries of the whole task vector keeps its sign; all get one size.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from moekit.core.errors import UserError
from moekit.core.load import find_model
from moekit.core.model_files import side_files
from moekit.core.task_vector import (
    DATA_FILE,
    HEAD_FILE,
    TaskVectorHead,
    encode,
    hashes_of,
    rice_bits,
)
from moekit.core.writer import check_output
from moekit.merge.job import TensorJob
from moekit.merge.sources import MergeSources, common_shape
from moekit.merge.task_vectors import task_vector_blocks
from moekit.merge.whole_model import whole_model_rules


@dataclass(frozen=True)
class Compressed:
    """What was written: entries in all and kept, their size, bytes, and the error left.

    `error` is the share of the task vector's squares that the ternary one does not explain;
    `entropy` the bits an entry that positions and signs need at least.
    """

    entries: int
    kept: int
    size: float
    bytes: int
    error: float

    @property
    def bits(self) -> float:
        """Bits an entry."""
        return 8 * self.bytes / self.entries

    @property
    def entropy(self) -> float:
        share = self.kept / self.entries
        rest = 1 - share
        if not 0 < share < 1:
            return share
        return share - share * math.log2(share) - rest * math.log2(rest)


def compress_task_vector(
    model: str | Path,
    base: str | Path,
    out: str | Path,
    *,
    density: float = 0.1,
    alpha: float | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Compressed:
    """Write the task vector of `model` over `base` to directory `out`, ternary.

    The share `density` of its largest entries stays. They get `alpha` times the standard deviation
    of all entries or, without it, their own mean magnitude, which loses least. `out` can then be
    named like a model where moekit merges. Raises `UserError` for impossible shares and for models
    that differ in more than values.
    """
    if not 0 < density < 1:
        raise UserError(f"density is {density}; it is a share of entries, between 0 and 1.")
    target = Path(out)
    check_output(target, overwrite)
    with MergeSources([str(base), str(model)], find_model) as sources:
        below, tuned = sources[str(base)], sources[str(model)]
        jobs = {}
        for name, tensor in below.tensors.items():
            if name not in tuned.tensors:
                raise UserError(f"{model} has no tensor {name}, which {base} has.")
            common_shape(name, {str(base): tensor, str(model): tuned.tensors[name]})
            given = {"weight": [1.0], "density": [density]}
            jobs[name] = TensorJob(
                name, tensor, [tuned.tensors[name]], given, {}, torch.float32, _never
            )
        rule = whole_model_rules(list(jobs.values()), [density])[0]
        codes, counts = {}, {}
        rice = rice_bits(density)
        entries = kept = 0
        total = squares = kept_sum = 0.0
        for number, (name, job) in enumerate(jobs.items()):
            blocks = task_vector_blocks(job.cast(job.base), job.tensors[0], job.block_rows)
            places, signs, offset = [], [], 0
            for block, mask, _ in rule.masked(blocks):
                flat = block.flatten().numpy()
                here = np.flatnonzero(mask.flatten().numpy() & (flat != 0))
                places.append(here + offset)
                signs.append(flat[here] < 0)
                kept_sum += float(np.abs(flat[here]).sum(dtype=np.float64))
                total += float(flat.sum(dtype=np.float64))
                squares += float(np.square(flat, dtype=np.float64).sum())
                offset += len(flat)
            positions = np.concatenate(places)
            entries, kept = entries + offset, kept + len(positions)
            if len(positions):
                counts[name] = len(positions)
                codes[name] = encode(positions, np.concatenate(signs), rice)
            if progress is not None:
                progress(number + 1, len(jobs))
        if not kept:
            raise UserError(f"{model} is equal to {base}; there is no task vector.")
        deviation = math.sqrt(max(squares / entries - (total / entries) ** 2, 0))
        size = kept_sum / kept if alpha is None else alpha * deviation
        place = str(Path(base).resolve()) if Path(base).is_dir() else str(base)
        head = TaskVectorHead(place, hashes_of(below.checkpoint), density, size, rice, counts)
        _write(target, tuned.directory, tuned.raw, head, codes, overwrite)
    error = (squares - 2 * size * kept_sum + kept * size**2) / squares
    return Compressed(entries, kept, size, sum(c.numel() for c in codes.values()), error)


def _write(
    target: Path,
    source: Path,
    config: dict,
    head: TaskVectorHead,
    codes: dict[str, torch.Tensor],
    overwrite: bool,
) -> None:
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, path in side_files(source)[0].items():
        place = partial / name
        place.parent.mkdir(exist_ok=True)
        shutil.copy(path, place)
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (partial / HEAD_FILE).write_text(head.to_json())
    save_file(codes, partial / DATA_FILE)
    if overwrite:
        shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)


def _never(model: int) -> torch.Generator:
    raise AssertionError("nothing is drawn here")
