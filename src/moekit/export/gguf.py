"""`convert_gguf`: stream a checkpoint into one GGUF file, as llama.cpp reads it.

Tensors are read, encoded and written in pieces of at most one expert or `PIECE_BYTES`, so memory
does not grow with the model. The file appears at its name by one rename, when it is complete.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moekit.core.architecture import read_config
from moekit.core.checkpoint import Checkpoint
from moekit.core.codec_choice import DEFAULT_CODEC
from moekit.core.convert import check_fit, prepare
from moekit.core.deferred import Deferred
from moekit.core.errors import UserError
from moekit.core.layout import PER_EXPERT
from moekit.core.memory import format_bytes
from moekit.core.model_card import ModelCard, read_card
from moekit.core.packed import CodecChoice
from moekit.core.plan import ExpertPlan
from moekit.core.record import FileHash, start_record
from moekit.core.registry import register
from moekit.core.rewrite import Rewrite
from moekit.core.spec import spec_from_config
from moekit.core.write_model import ASSUMED_BYTES_PER_SECOND
from moekit.export.gguf_keys import add_keys, check_family, differences, family_of
from moekit.export.gguf_tensors import gguf_tensors
from moekit.export.gguf_types import FILE_TYPES, Encoding, check_type, encode, encoding_of
from moekit.export.gguf_vocab import add_vocabulary, read_vocabulary

PIECE_BYTES = 16 * 2**20
SUFFIX = ".partial"
RECORD_SUFFIX = ".record.json"
CARD_SUFFIX = ".md"
PLAN_SUFFIX = ".plan.json"


@dataclass
class GgufResult:
    """What was written, or in a dry run would be. Sizes in bytes of tensor data.

    `types` counts tensors by number format; `experts` maps layers to the number of experts
    (before, after) where a plan changed it; `notes` is what the user should know.
    """

    out: Path
    architecture: str
    tensors: int
    bytes: int
    source_bytes: int
    types: dict[str, int]
    seconds: float = 0.0
    experts: dict[int, tuple[int, int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@register(
    "converter",
    "gguf",
    title="One GGUF file, which llama.cpp and its relatives run",
    needs=("weights",),
    limits="Families in moekit.export.gguf_families; tokenizers of byte-level BPE.",
    options={
        "gguf_type": "number format of the weights",
        "pre": "llama.cpp's name of the rule that splits text, where it is not recognised",
    },
)
def convert_gguf(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    plan: ExpertPlan | None = None,
    *,
    rewrite: Rewrite | None = None,
    codec: CodecChoice = DEFAULT_CODEC,
    gguf_type: str = "f16",
    pre: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> GgufResult:
    """Write the checkpoint in directory `model` as the GGUF file `out` in constant memory.

    `plan` changes the experts and `rewrite` computes their values; the bits of a plan are rounded
    by codecs of the kind of `codec`, and the decoded values written. `gguf_type` is one of
    `gguf_types.FILE_TYPES`; norms, biases and routers stay in f32. `progress` gets (bytes written,
    all bytes), `note` lines for the user. A record of the run lies beside the file, with a plan its
    card as well. An interruption leaves nothing at `out`.

    Raises `UserError` for a family or variant that llama.cpp does not compute as transformers does,
    and for everything in the request, the checkpoint or the disk that stands in the way.
    """
    check_type(gguf_type)
    if importlib.util.find_spec("gguf") is None:
        raise UserError("--to gguf needs the package gguf: pip install 'moekit[gguf]'.")
    import gguf

    source, target = Path(model), Path(out)
    _check_target(target, overwrite)
    family = family_of(read_config(source).model_type)
    with Checkpoint(source) as checkpoint:
        check_fit(plan, rewrite)
        work = prepare(checkpoint, PER_EXPERT, plan, None, target, rewrite=rewrite, codec=codec)
        config = read_config(work.config)
        spec = spec_from_config(config)
        check_family(family, config, spec)
        published = {name: t for name, t in work.tensors.items() if name not in work.unused}
        tensors = gguf_tensors(published, family, config)
        encodings = {n: encoding_of(n, tuple(t.shape), gguf_type) for n, t in tensors.items()}
        vocabulary = read_vocabulary(source, config, pre)
        arch = gguf.MODEL_ARCH_NAMES[getattr(gguf.MODEL_ARCH, family.arch)]
        result = GgufResult(
            out=target,
            architecture=arch,
            tensors=len(tensors),
            bytes=sum(encodings[n].nbytes(tuple(t.shape)) for n, t in tensors.items()),
            source_bytes=checkpoint.nbytes,
            types=_count(encodings.values()),
            experts=work.result.experts,
            notes=[
                *differences(config),
                *_notes(gguf_type, encodings, work.unused, vocabulary is None),
            ],
        )
        if dry_run:
            result.seconds = (result.bytes + result.source_bytes) / ASSUMED_BYTES_PER_SECOND
            return result
        record = start_record("convert", {"model": source, "to": "gguf", "gguf_type": gguf_type})
        writer = _new_writer(arch, source.resolve().name, gguf_type)
        add_keys(writer, family, config, spec)
        add_vocabulary(writer, vocabulary)
        with _partial(target, result.bytes) as partial:
            _write(writer, partial, tensors, encodings, progress)
            record.inputs = [FileHash.of(path) for path in checkpoint.files]
            record.finish(
                {"bytes": result.bytes, "tensors": result.tensors},
                [FileHash.of(partial, target.name)],
            )
            _check_target(target, overwrite)
            os.replace(partial, target)
        target.with_name(target.name + RECORD_SUFFIX).write_text(record.to_json())
        if plan is not None:
            sizes = (result.source_bytes, result.bytes)
            command = ["moekit", "convert", str(source), str(target), "--to", "gguf"]
            plan_at = target.with_name(target.name + PLAN_SUFFIX)
            command += ["--gguf-type", gguf_type, "--plan", plan_at.name]
            card = ModelCard(
                str(source),
                shlex.join(command),
                plan,
                sizes,
                result.notes,
                plan_at=plan_at.name,
            )
            target.with_name(target.name + CARD_SUFFIX).write_text(card.text(read_card(source)))
            plan.save(plan_at)
    result.seconds = record.seconds
    if note is not None:
        for line in result.notes:
            note(line)
    return result


def _new_writer(arch: str, name: str, gguf_type: str) -> Any:
    """A `gguf.GGUFWriter` that knows what kind of file it writes, and no model yet."""
    import gguf

    writer = gguf.GGUFWriter(None, arch)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[gguf_type]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    return writer


def _check_target(target: Path, overwrite: bool) -> None:
    if target.is_dir():
        raise UserError(f"{target} is a directory; --to gguf writes one file, such as OUT.gguf.")
    if target.exists():
        if not overwrite:
            raise UserError(f"{target} exists; give another name or --overwrite to replace it.")
        with target.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise UserError(f"{target} is no GGUF file, so --overwrite does not replace it.")


def _count(encodings: Any) -> dict[str, int]:
    names = [encoding.name for encoding in encodings]
    return {name: names.count(name) for name in dict.fromkeys(sorted(names))}


def _notes(
    chosen: str, encodings: Mapping[str, Encoding], unused: set[str], no_tokenizer: bool
) -> list[str]:
    notes = []
    narrow = [n for n, e in encodings.items() if e.name == "f16" and chosen != "f16"]
    if narrow:
        notes.append(
            f"{len(narrow)} tensors are in f16: their rows are no whole number of blocks "
            f"({narrow[0]})."
        )
    if unused:
        notes.append(f"Left out {len(unused)} tensors that the model class does not use.")
    if no_tokenizer:
        notes.append("The model has no tokenizer; llama.cpp can run it on token ids only.")
    return notes


@contextmanager
def _partial(target: Path, nbytes: int) -> Iterator[Path]:
    """A path beside `target` to write to; what is left there when the block fails is removed."""
    partial = target.with_name(target.name + SUFFIX)
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(partial.parent).free
        if nbytes > free:
            raise UserError(
                f"{target} needs {format_bytes(nbytes)} and its disk has {format_bytes(free)} free."
            )
        handle = os.open(partial, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror}.") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"Another process is writing to {partial}; wait for it or give another output."
            ) from None
        try:
            yield partial
        except OSError as error:
            raise UserError(f"{target} cannot be written: {error.strerror}.") from None
        finally:
            partial.unlink(missing_ok=True)
    finally:
        os.close(handle)


def _write(
    writer: Any,
    path: Path,
    tensors: Mapping[str, Deferred],
    encodings: Mapping[str, Encoding],
    progress: Callable[[int, int], None] | None,
) -> None:
    import gguf
    import numpy as np

    for name, tensor in tensors.items():
        to = encodings[name]
        kind = gguf.GGMLQuantizationType[to.name.upper()]
        # The package takes shapes in bytes for what it has no number type for.
        shape = (*tensor.shape[:-1], to.row_bytes(tensor.shape[-1]))
        writer.add_tensor_info(name, shape, np.dtype(np.uint8), to.nbytes(tensor.shape), kind)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    file = writer.fout[0]
    total, done = sum(encodings[n].nbytes(t.shape) for n, t in tensors.items()), 0
    try:
        writer.write_padding(file, file.tell())
        for name, tensor in tensors.items():
            written = 0
            for _, piece in tensor.pieces(piece_bytes=PIECE_BYTES):
                data = encode(name, piece, encodings[name])
                file.write(data.data)
                written += data.nbytes
                done += data.nbytes
                if progress is not None:
                    progress(done, total)
            writer.write_padding(file, written)
        file.flush()
        os.fsync(file.fileno())
    finally:
        writer.close()
