"""`convert`: stream a checkpoint into another layout, number format or set of experts.

Nothing is loaded: source tensors become `Deferred`s, the rules of transformers turn them into the
model's parameters and back, and the writer pulls the result through memory piece by piece.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import build_glob_alternation, dot_natural_key

from moekit.core.apply_plan import apply_plan
from moekit.core.architecture import meta_model, read_config
from moekit.core.checkpoint import Checkpoint, read_json
from moekit.core.codec_choice import DEFAULT_CODEC, codec_at
from moekit.core.deferred import Deferred
from moekit.core.dequant import dequantize, quantization_of
from moekit.core.errors import UserError
from moekit.core.layout import (
    FUSED,
    LAYOUTS,
    PER_EXPERT,
    deferred_tensors,
    to_model,
    to_published,
)
from moekit.core.model_files import edited_config
from moekit.core.packed import CodecChoice
from moekit.core.plan import ExpertPlan
from moekit.core.registry import register_preset
from moekit.core.result_shape import STOCK_ALIGN
from moekit.core.rewrite import Rewrite
from moekit.core.write_model import Converted, Work, write_model
from moekit.core.writer import DEFAULT_SHARD_BYTES, check_output

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def convert(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    to: str = FUSED,
    plan: ExpertPlan | str | os.PathLike[str] | None = None,
    *,
    rewrite: Rewrite | None = None,
    codec: CodecChoice = DEFAULT_CODEC,
    dtype: str | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    restart: bool = False,
    copy_code: bool = False,
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> Converted:
    """Write the checkpoint in directory `model` to directory `out` in constant memory.

    `to` is "fused" (one bank per layer, the names of the model's parameters) or "per-expert" (what
    `save_pretrained` writes by default, which for some families keeps banks). `plan` changes the
    experts and `rewrite` computes their values; where a plan has bits, `codec` is the kind of codec
    that rounds, and what is written are its decoded values.
    `dtype` casts as `from_pretrained(dtype=...)` would; without it every tensor keeps its own.
    `copy_code` also copies Python files. `progress` gets (bytes written, all bytes), `note` lines
    for the user. An interrupted conversion continues when called again with the same arguments.

    Raises `UserError` for everything in the request, the checkpoint or the disk that stands in the
    way, and before anything is written wherever that can be known before.
    """
    if to not in LAYOUTS:
        raise UserError(f"--to {to!r} is no layout; there are {' and '.join(LAYOUTS)}.")
    source, target = Path(model), Path(out)
    plan = check_request(source, target, plan, dtype, overwrite)
    check_fit(plan, rewrite)
    options = {
        "to": to,
        "dtype": dtype,
        "plan": plan_hash(plan),
        **rewrite_options(plan, rewrite, codec),
        "copy_code": copy_code,
    }
    with Checkpoint(source) as checkpoint:
        work = prepare(checkpoint, to, plan, dtype, target, rewrite=rewrite, codec=codec)
        return write_model(
            work,
            checkpoint,
            options,
            max_shard_bytes=max_shard_bytes,
            overwrite=overwrite,
            restart=restart,
            dry_run=dry_run,
            progress=progress,
            note=note,
            plan=plan,
        )


def check_request(
    source: Path,
    target: Path,
    plan: ExpertPlan | str | os.PathLike[str] | None,
    dtype: str | None,
    overwrite: bool,
) -> ExpertPlan | None:
    """Refuse what every conversion refuses before it opens the checkpoint; loads the plan."""
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype {dtype!r} is unknown; there are {', '.join(DTYPES)}.")
    _check_places(source, target)
    check_output(target, overwrite)
    return plan if plan is None or isinstance(plan, ExpertPlan) else ExpertPlan.load(plan)


def check_fit(plan: ExpertPlan | None, rewrite: Rewrite | None) -> None:
    """Refuse a plan whose values some method must compute when there is none to do it."""
    if plan is not None and plan.fit is not None and rewrite is None:
        raise UserError(
            f"The plan's values are computed by {plan.fit.method}: give the rewrite that "
            "moekit.compress.rewrite_of(plan) makes."
        )


def rewrite_options(
    plan: ExpertPlan | None, rewrite: Rewrite | None, codec: CodecChoice
) -> dict[str, Any]:
    """What tells one way of computing experts from another when a conversion resumes."""
    rounds = plan is not None and "bits" in plan.uses()
    return {
        **({"rewrite": dict(rewrite.identity)} if rewrite is not None else {}),
        **({"codec": codec.name, "group_size": codec.group_size} if rounds else {}),
    }


def plan_hash(plan: ExpertPlan | None) -> str | None:
    return None if plan is None else hashlib.sha256(plan.to_json().encode()).hexdigest()[:16]


register_preset(
    convert,
    FUSED,
    kind="converter",
    title="One tensor for all experts of a layer, as the model holds them",
    needs=("weights",),
    settings={"to": FUSED},
)
register_preset(
    convert,
    PER_EXPERT,
    kind="converter",
    title="One tensor an expert and projection, as save_pretrained writes them",
    needs=("weights",),
    limits="Families that have no per-expert layout keep their banks.",
    settings={"to": PER_EXPERT},
)


def _check_places(source: Path, target: Path) -> None:
    if not source.is_dir():
        raise UserError(f"{source} is no directory with a model.")
    inner, outer = target.resolve(), source.resolve()
    if inner == outer or outer in inner.parents or inner in outer.parents:
        raise UserError(f"{target} overlaps the model at {source}; give another output directory.")


def prepare(
    checkpoint: Checkpoint,
    to: str,
    plan: ExpertPlan | None,
    dtype: str | None,
    target: Path,
    *,
    rewrite: Rewrite | None = None,
    codec: CodecChoice = DEFAULT_CODEC,
    uneven: bool = False,
    align: int = STOCK_ALIGN,
) -> Work:
    """What `convert` with these arguments would write, lazily; raises as it does.

    `uneven` and `align` are as for `result_shape`.
    """
    raw = read_json(checkpoint.directory / "config.json")
    config = original = read_config(checkpoint.directory)
    quantization = quantization_of(raw)
    stored = deferred_tensors(checkpoint)
    notes: list[str] = []
    if quantization is not None:
        stored = dequantize(stored, quantization)
        # Decoded values are float32 in memory only; without --dtype the config's own is written.
        dtype = dtype or str(config.dtype or torch.bfloat16).removeprefix("torch.")
        notes.append(f"Dequantised from {quantization['quant_method']} to {dtype}.")
    with _default_dtype(dtype):
        model = meta_model(config)
        mapped = to_model(stored, model)
        tensors, experts, computed = mapped.tensors, {}, {}
        if plan is not None or rewrite is not None:
            applied = apply_plan(
                plan or ExpertPlan(),
                config,
                model,
                tensors,
                rewrite=rewrite,
                codec_at=lambda bits: codec_at(bits, codec).make(),
                scratch=target.absolute().parent,
                uneven=uneven,
                align=align,
            )
            config, model, tensors = applied.config, applied.model, applied.tensors
            experts, computed = applied.experts, applied.computed
            notes += applied.notes
    unused = {name: stored[name] for name in mapped.unused}
    if dtype is not None:
        tensors, unused = cast_tensors(tensors, unused, model, DTYPES[dtype])
    if to == PER_EXPERT:
        tensors = to_published(tensors, model, mapped.transforms)
    if unused and experts:
        # Their number of experts would contradict the config.
        notes.append(f"Left out {len(unused)} tensors that {type(model).__name__} does not use.")
    else:
        tensors = {**unused, **tensors}
    # What was written must be found again, in name and shape, by the class that will load it.
    layout = to_model(tensors, model).layout
    if layout != to:
        notes.append(f"{config.model_type} is published with fused banks; it has no other layout.")
    result = Converted(
        out=target,
        source_layout=mapped.layout,
        layout=layout,
        tensors=len(tensors),
        bytes=sum(tensor.nbytes for tensor in tensors.values()),
        source_bytes=checkpoint.nbytes,
        shards=0,
        experts=experts,
        notes=notes,
    )
    ordered = {name: tensors[name] for name in sorted(tensors, key=dot_natural_key)}
    left = set(unused) & set(ordered)
    written = edited_config(raw, original, config, dtype)
    return Work(ordered, written, left, result, computed)


@contextmanager
def _default_dtype(dtype: str | None) -> Iterator[None]:
    """Parameters that a class creates without naming a dtype get this one, as when loading."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[dtype] if dtype is not None else before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def cast_tensors(
    tensors: Mapping[str, Deferred],
    unused: Mapping[str, Deferred],
    model: PreTrainedModel,
    dtype: torch.dtype,
) -> tuple[dict[str, Deferred], dict[str, Deferred]]:
    """Cast as `from_pretrained(dtype=...)`: some modules and parameters insist on float32."""
    wanted = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    kept = model._get_dtype_plan(dtype)
    if kept:
        pattern, group_of, _ = build_glob_alternation(list(kept))
        for name in wanted:
            if match := pattern.search(name):
                wanted[name] = kept[group_of[match.lastgroup or ""]]
    cast = {name: _to(tensor, wanted.get(name, dtype)) for name, tensor in tensors.items()}
    return cast, {
        name: _to(tensor, dtype) if tensor.is_floating_point() else tensor
        for name, tensor in unused.items()
    }


def _to(tensor: Deferred, dtype: torch.dtype) -> Any:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)
