"""Writing a prepared model: tensors, config, side files, plan, card and record, all or nothing."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from moekit.core.apply_plan import ResultLayer
from moekit.core.checkpoint import Checkpoint, TensorInfo
from moekit.core.deferred import Deferred
from moekit.core.model_card import CARD_FILE, PLAN_DIRECTORY, ModelCard, read_card
from moekit.core.model_files import side_files
from moekit.core.plan import PLAN_FILE, TENSORS_SUFFIX, ExpertPlan
from moekit.core.record import RECORD_FILE, FileHash, RunRecord, start_record
from moekit.core.shards import Shard
from moekit.core.writer import CheckpointWriter

# Read plus write on one slow disk; only for the forecast of a dry run.
ASSUMED_BYTES_PER_SECOND = 200e6


class Written(Protocol):
    """A tensor that is written rows by rows: from row `first` on (row, rows from there), in order.

    `Deferred` is one.
    """

    def pieces(self, first: int = 0) -> Iterator[tuple[int, Tensor]]: ...


@dataclass
class Converted:
    """What a conversion wrote, or in a dry run would write. Sizes in bytes of tensor data.

    `source_layout` and `layout` are "fused" or "per-expert"; `experts` maps layers to the number of
    experts (before, after) where a plan changed it; `notes` is what the user should know.
    """

    out: Path
    source_layout: str
    layout: str
    tensors: int
    bytes: int
    source_bytes: int
    shards: int
    resumed_bytes: int = 0
    seconds: float = 0.0
    experts: dict[int, tuple[int, int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass
class Work:
    """A prepared conversion: what to write, in order, and the config that goes with it.

    `unused` are the names of tensors that the model class has no place for; `computed` has the
    experts that a plan changes, by decoder layer.
    """

    tensors: dict[str, Deferred]
    config: dict[str, Any]
    unused: set[str]
    result: Converted
    computed: dict[int, ResultLayer] = field(default_factory=dict)


def write_model(
    work: Work,
    checkpoint: Checkpoint,
    options: Mapping[str, Any],
    *,
    max_shard_bytes: int,
    overwrite: bool,
    restart: bool,
    dry_run: bool,
    progress: Callable[[int, int], None] | None,
    note: Callable[[str], None] | None,
    plan: ExpertPlan | None = None,
    shards: list[Shard] | None = None,
    header: Callable[[Mapping[str, Path]], tuple[str, str]] | None = None,
) -> Converted:
    """Write prepared tensors, config, side files and record to `work.result.out`.

    `options` tell one conversion from another when it resumes; `copy_code` among them is heeded.
    Beside a model that a `plan` made lie the plan and a model card.
    `shards` lays the tensors out; `header` then gives the name and content of the file that says
    where they lie, from the finished shards (name -> path). The rest is as for `convert`.
    """
    source, result = checkpoint.directory, work.result
    copied, left_out = side_files(source, options["copy_code"])
    if left_out:
        result.notes.append(f"Not copied: {', '.join(left_out)}.")
    record = None if dry_run else start_record("convert", {"model": source, **options})
    writer = CheckpointWriter(
        result.out,
        {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in work.tensors.items()},
        identity={"model": str(source.resolve()), "files": state_of(checkpoint), **options},
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
        restart=restart,
        shards=shards,
    )
    result.shards = len(writer.shard_files)
    if record is None:
        result.seconds = (result.bytes + result.source_bytes) / ASSUMED_BYTES_PER_SECOND
        return result

    def files(shards: Mapping[str, Path]) -> dict[str, str | bytes]:
        found: dict[str, str | bytes] = {name: path.read_bytes() for name, path in copied.items()}
        found["config.json"] = json.dumps(work.config, indent=2) + "\n"
        found |= {} if header is None else dict([header(shards)])
        return found | plan_files(plan, source, options, result)

    result.resumed_bytes = fill(
        writer, work.tensors, files, record, checkpoint.files, progress=progress, note=note
    )
    result.seconds = record.seconds
    if note is not None:
        for line in result.notes:
            note(line)
    return result


def fill(
    writer: CheckpointWriter,
    tensors: Mapping[str, Written],
    files: Callable[[Mapping[str, Path]], Mapping[str, str | bytes]],
    record: RunRecord,
    inputs: Iterable[Path],
    *,
    progress: Callable[[int, int], None] | None,
    note: Callable[[str], None] | None,
) -> int:
    """Write `tensors`, other files and the record with `writer`, and make the result appear.

    `files` gives name -> content from the finished shards (name -> path); `inputs` are the files
    that the record names as read. Returns the bytes that an interrupted run had left.
    """
    with writer:
        if writer.resumed_bytes and note is not None:
            note(writer.resume_note())
        _write_tensors(writer, tensors, progress)
        for name, content in files(writer.shard_paths()).items():
            writer.write_file(name, content)
        record.inputs = [FileHash.of(path) for path in inputs]
        record.finish(
            {"bytes": writer.total_bytes, "tensors": len(tensors)},
            [FileHash.of(path, name) for name, path in writer.shard_paths().items()],
        )
        writer.write_file(RECORD_FILE, record.to_json())
        writer.commit()
    return writer.resumed_bytes


def plan_files(
    plan: ExpertPlan | None, source: Path, options: Mapping[str, Any], result: Converted
) -> dict[str, str | bytes]:
    """The plan and the model card that lie beside a model, by name."""
    if plan is None:
        return {}
    command = ["moekit", "convert", str(source), str(result.out), "--to", str(options["to"])]
    for name in ("codec", "group_size", "resident_codec", "dtype"):
        if options.get(name) is not None:
            command += [f"--{name.replace('_', '-')}", str(options[name])]
    sizes = (result.source_bytes, result.bytes)
    card = ModelCard(
        str(source), shlex.join([*command, "--plan", PLAN_FILE]), plan, sizes, result.notes
    )
    files: dict[str, str | bytes] = {
        CARD_FILE: card.text(read_card(source)),
        f"{PLAN_DIRECTORY}/{PLAN_FILE}": plan.to_json(),
    }
    if plan.tensors:
        tensors = Path(PLAN_FILE).with_suffix(TENSORS_SUFFIX)
        files[f"{PLAN_DIRECTORY}/{tensors}"] = plan.tensors.to_bytes()
    return files


def state_of(checkpoint: Checkpoint) -> str:
    """Changes when the source does: names, sizes and times of its files."""
    files = [*checkpoint.files, checkpoint.directory / "config.json"]
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:16]


def _write_tensors(
    writer: CheckpointWriter,
    tensors: Mapping[str, Written],
    progress: Callable[[int, int], None] | None,
) -> None:
    """Write what is pending; the next piece is read and computed while one is written."""
    pieces = (
        (name, row, piece)
        for name, first in writer.left()
        for row, piece in tensors[name].pieces(first)
    )
    # Whether gradients are kept is a thread's own matter.
    grad = (torch.is_grad_enabled(),)
    with ThreadPoolExecutor(1, initializer=torch.set_grad_enabled, initargs=grad) as reader:
        following = reader.submit(next, pieces, None)
        while (made := following.result()) is not None:
            following = reader.submit(next, pieces, None)
            writer.write_rows(*made)
            if progress is not None:
                progress(writer.written_bytes, writer.total_bytes)
