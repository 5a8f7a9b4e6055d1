"""A model whose experts are wider and compute the same: for measuring with experts of real size.

    python benchmarks/widen.py babel OUT --width 8192

Every expert gets neurons whose row of the gate and up projections is random and whose column of the
down projection is zero. The function stays, so does the routing, and with them what a cache or a
predictor sees on real text; the bytes are those of a large model. Written in constant memory.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from moekit.core.checkpoint import Checkpoint
from moekit.core.convert import prepare
from moekit.core.deferred import Deferred, Region
from moekit.core.errors import UserError
from moekit.core.layout import PER_EXPERT
from moekit.core.load import find_model
from moekit.core.memory import bytes_of, format_bytes
from moekit.core.seeds import generator
from moekit.core.write_model import Converted, Work, write_model

WIDTH_FIELD = "moe_intermediate_size"
_EXPERT = re.compile(r".*\.experts\.\d+\.(gate|up|down)_proj\.weight")
# The axis of a projection along which the expert is wide.
_AXIS = {"gate": 0, "up": 0, "down": 1}


def widen(
    model: str | Path,
    out: str | Path,
    width: int,
    *,
    seed: int = 0,
    dtype: str | None = None,
    max_shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Converted:
    """Write `model` with experts of `width` neurons to `out`, in the per-expert layout.

    The added rows are normal with the spread of the rows that are there, keyed by `seed` and their
    tensor. An interrupted run continues. Raises `UserError` for a model without single experts of
    gate, up and down or with shared ones, and for a width that is not larger than its own.
    """
    source, target = find_model(model), Path(out)
    with Checkpoint(source) as checkpoint:
        work = prepare(checkpoint, PER_EXPERT, None, dtype, target)
        old = work.config.get(WIDTH_FIELD)
        experts = {name: m[1] for name in work.tensors if (m := _EXPERT.fullmatch(name))}
        if not isinstance(old, int) or not experts:
            raise UserError(f"{source} has no {WIDTH_FIELD} or no experts of gate, up and down.")
        if shared := next((name for name in work.tensors if ".shared_experts." in name), None):
            raise UserError(f"{shared} has the width of the routed experts and would not fit them.")
        if width <= old:
            raise UserError(f"--width is {width}; the experts already have {old} neurons.")
        for name, projection in experts.items():
            work.tensors[name] = _wider(name, work.tensors[name], projection, width, seed)
        work.config[WIDTH_FIELD] = width
        work.result.bytes = sum(tensor.nbytes for tensor in work.tensors.values())
        return _write(work, checkpoint, width, seed, dtype, max_shard_bytes, overwrite, progress)


def _wider(name: str, tensor: Deferred, projection: str, width: int, seed: int) -> Deferred:
    axis = _AXIS[projection]
    shape = list(tensor.shape)
    shape[axis] = width

    def read(region: Region) -> Tensor:
        # One projection of one expert at a time is read whole; it is a few megabytes.
        old = tensor.read()
        missing = list(old.shape)
        missing[axis] = width - old.shape[axis]
        added = torch.zeros(missing)
        if projection != "down":
            added.normal_(std=float(old.float().std()), generator=generator(seed, f"widen {name}"))
        whole = torch.cat([old, added.to(old.dtype)], axis)
        return whole[tuple(slice(start, stop) for start, stop in region)]

    return Deferred(tuple(shape), tensor.dtype, read)


def _write(
    work: Work,
    checkpoint: Checkpoint,
    width: int,
    seed: int,
    dtype: str | None,
    max_shard_bytes: int,
    overwrite: bool,
    progress: Callable[[int, int], None] | None,
) -> Converted:
    return write_model(
        work,
        checkpoint,
        {"to": PER_EXPERT, "width": width, "seed": seed, "dtype": dtype, "copy_code": False},
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
        restart=False,
        dry_run=False,
        progress=progress,
        note=None,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a model directory, or babel")
    parser.add_argument("out", type=Path)
    parser.add_argument("--width", type=int, default=8192, help="neurons of an expert")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", help="float32, bfloat16 or float16; as stored unless given")
    parser.add_argument("--max-shard-size", default="5GB")
    parser.add_argument("--overwrite", action="store_true")
    given = parser.parse_args()
    try:
        done = widen(
            given.model,
            given.out,
            given.width,
            seed=given.seed,
            dtype=given.dtype,
            max_shard_bytes=bytes_of(given.max_shard_size),
            overwrite=given.overwrite,
        )
    except UserError as error:
        sys.exit(str(error))
    print(f"wrote {done.out}: {done.tensors} tensors, {format_bytes(done.bytes)}")


if __name__ == "__main__":
    main()
