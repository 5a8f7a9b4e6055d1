"""`upcycle`: open the models, have a converter make the new one, check its step 0, write it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import dot_natural_key

from moekit.core.architecture import architecture_of, meta_model
from moekit.core.checkpoint import TensorInfo
from moekit.core.convert import DTYPES, cast_tensors
from moekit.core.deferred import Deferred
from moekit.core.errors import UserError
from moekit.core.layout import FUSED, LAYOUTS, PER_EXPERT, to_model, to_published
from moekit.core.load import find_model
from moekit.core.model_card import CARD_FILE
from moekit.core.model_files import side_files
from moekit.core.record import start_record
from moekit.core.source_model import SourceModel, open_source
from moekit.core.stats_files import open_stats
from moekit.core.write_model import fill, state_of
from moekit.core.writer import DEFAULT_SHARD_BYTES, CheckpointWriter, check_output
from moekit.upcycle.card import card
from moekit.upcycle.check_start import measure_start
from moekit.upcycle.converter import Entry, Job, Made, by_parameter, find_converter
from moekit.upcycle.start import Start
from moekit.upcycle.tokenizers import check_tokenizers


@dataclass(frozen=True)
class Request:
    """What is asked for: a method with its options, and the models it works on.

    `others` are models beside the base and `entries` what is said of each of them, or empty.
    `dtype` is None for that of the source; `to` is a layout of `convert`; `data` are files of text.
    """

    method: str
    base: str
    others: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    entries: tuple[Entry, ...] = ()
    dtype: str | None = None
    to: str = FUSED
    data: tuple[str, ...] = ()


@dataclass
class Upcycled:
    """What was written, or in a dry run would be; sizes in bytes.

    `measured` is the largest logit difference at step 0 as a share, None where it was not taken.
    """

    out: Path
    model_type: str
    tensors: int
    bytes: int
    source_bytes: int
    start: Start
    measured: float | None = None
    seconds: float = 0.0
    resumed_bytes: int = 0
    notes: list[str] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)


def upcycle(
    request: Request,
    out: str | Path,
    *,
    seed: int = 0,
    stats: str | Path | None = None,
    check: bool = True,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    restart: bool = False,
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> Upcycled:
    """Write the model that `request` asks for to directory `out`.

    `stats` is a directory of `moekit profile`. With `check` what the converter says of step 0 is
    measured first where both models fit in memory, and nothing is written where it does not hold.
    An interrupted run continues when called again with the same arguments. Raises `UserError` for
    everything in the request, the models or the disk that stands in the way.
    """
    target = Path(out)
    check_output(target, overwrite)
    if request.dtype is not None and request.dtype not in DTYPES:
        raise UserError(f"--dtype {request.dtype!r} is unknown; there are {', '.join(DTYPES)}.")
    if request.to not in LAYOUTS:
        raise UserError(f"--to {request.to!r} is no layout; there are {' and '.join(LAYOUTS)}.")
    convert = find_converter(request.method, request.options)
    names = list(dict.fromkeys((request.base, *request.others)))
    with ExitStack() as stack:
        opened = {name: by_parameter(open_source(name, find_model(name), stack)) for name in names}
        base = opened[request.base]
        others = tuple(opened[name] for name in request.others)
        check_tokenizers(base, others)
        made = convert(
            Job(
                base,
                others,
                seed,
                None if stats is None else open_stats(Path(stats)),
                request.entries,
                request.data,
                dry_run,
            )
        )
        tensors = laid_out(made, request)
        result = Upcycled(
            target,
            made.config.model_type,
            len(tensors),
            sum(tensor.nbytes for tensor in tensors.values()),
            sum(source.checkpoint.nbytes for source in opened.values()),
            made.start,
            notes=made.notes,
            numbers=made.numbers,
        )
        if dry_run:
            return result
        if check:
            result.measured = _checked(base, made, seed, result.notes)
        record = start_record("upcycle", _told(request, stats), seed=seed)
        writer = CheckpointWriter(
            target,
            {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in tensors.items()},
            identity={
                "request": _hash(asdict(request)),
                "seed": seed,
                "stats": None if stats is None else str(Path(stats).resolve()),
                "files": {name: state_of(source.checkpoint) for name, source in opened.items()},
            },
            max_shard_bytes=max_shard_bytes,
            overwrite=overwrite,
            restart=restart,
        )
        record.metrics = {
            "start": made.start.to_dict(),
            "start_measured": result.measured,
            **made.numbers,
        }
        result.resumed_bytes = fill(
            writer,
            tensors,
            lambda _: _files(base, made, request, result),
            record,
            [path for source in opened.values() for path in source.checkpoint.files],
            progress=progress,
            note=note,
        )
        result.seconds = record.seconds
    if note is not None:
        for line in result.notes:
            note(line)
    return result


def laid_out(made: Made, request: Request) -> dict[str, Deferred]:
    """The tensors as they are written: cast, in the layout asked for, in the order of layers.

    Raises `UserError` where the model class would not find what it needs among them.
    """
    model = meta_model(made.config)
    tensors = to_model(made.tensors, model).tensors
    if request.dtype is not None:
        tensors, _ = cast_tensors(tensors, {}, model, DTYPES[request.dtype])
    if request.to == PER_EXPERT:
        tensors = to_published(tensors, model, [])
    return {name: tensors[name] for name in sorted(tensors, key=dot_natural_key)}


def _checked(base: SourceModel, made: Made, seed: int, notes: list[str]) -> float | None:
    measured = measure_start(base, made, seed)
    tolerance = made.start.tolerance
    if measured is None:
        notes.append("Step 0 was not measured: the models do not fit in memory.")
    elif tolerance is not None and not measured <= tolerance:
        raise UserError(
            f"{base.name}: the result should compute at step 0 what {made.start.equal_to} does, "
            f"within {tolerance:g} of the largest logit, but differs by {measured:.3g}; nothing "
            "was written. --no-check writes it all the same."
        )
    return measured


def _files(
    base: SourceModel, made: Made, request: Request, result: Upcycled
) -> dict[str, str | bytes]:
    """What lies beside the tensors, by name."""
    copied, _ = side_files(base.directory)
    files: dict[str, str | bytes] = {name: path.read_bytes() for name, path in copied.items()}
    dtypes = _dtypes(made, request)
    config = json.loads(made.config.to_json_string())
    config["architectures"] = [_class_of(made).__name__]
    config["dtype"] = str(max(dtypes, key=lambda d: dtypes[d])).removeprefix("torch.")
    files["config.json"] = json.dumps(config, indent=2) + "\n"
    files[CARD_FILE] = card(request, made, result)
    return files | made.files


def _told(request: Request, stats: str | Path | None) -> dict[str, Any]:
    """The request as the record has it: the options of the method beside its name."""
    told = {"model": request.base, "from": list(request.others), "stats": stats, "to": request.to}
    said = [asdict(entry) for entry in request.entries]
    told["data"] = list(request.data)
    given = {**told, "dtype": request.dtype, "entries": said, "method": request.method}
    return {**given, **request.options}


def _class_of(made: Made) -> type[PreTrainedModel]:
    return architecture_of(made.config)


def _dtypes(made: Made, request: Request) -> dict[torch.dtype, int]:
    """Weights by number format; correction biases keep float32 beside bfloat16 weights."""
    if request.dtype is not None:
        return {DTYPES[request.dtype]: 1}
    counts: dict[torch.dtype, int] = {}
    for tensor in _floating(made.tensors.values()):
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
    return counts


def _floating(tensors: Iterable[Deferred]) -> Sequence[Deferred]:
    return [tensor for tensor in tensors if tensor.is_floating_point()]


def _hash(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
